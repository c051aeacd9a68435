"""Training curves: which runs share axes."""

import json

import pytest

from delrec.evaluation.curves import curves_figure, logs_of, points


@pytest.fixture
def write(tmp_path):
    """write(run, config, log entries..): a run's folder with a log."""

    def written(run, config, *entries):
        folder = tmp_path / run
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, entries)))
        return folder

    return written


def backbone(loss, *losses):
    entries = [
        {"name": "SASRec", "step": i, "loss": x, "val_hr@1_of_15": 0.3 + i / 100}
        for i, x in enumerate(losses, 1)
    ]
    return {"stage": "train_backbone", "loss": loss}, *entries


def stage_1(ta, rps, **more):
    return (
        {"stage": "distill", "loss": "candidates", "C": 15, **more},
        {"name": "distill", "step": 1, "loss_ta": ta, "loss_rps": rps},
        {
            "name": "distill",
            "step": 2,
            "loss_ta": ta,
            "val_ta": 0.4,
            "loss_rps": rps,
            "val_rps": 0.5,
        },
    )


def stage_2(*losses, **more):
    entries = [{"name": "finetune", "step": i, "loss": x} for i, x in enumerate(losses, 1)]
    entries[-1]["val_hr@1"] = 0.6
    return {"stage": "finetune", "loss": "candidates", "C": 15, **more}, *entries


def drawn(folders):
    """{title of the left axes: the numbers of each line there}, and of the right ones."""
    fig = curves_figure(logs_of({folder: folder.name for folder in folders}))
    sides = {}, {}
    for i, ax in enumerate(fig.axes):
        lines = [line.get_ydata().tolist() for line in ax.get_lines()]
        sides[i % 2].setdefault(ax.get_title(), []).append(lines)
    legend = [text.get_text() for text in fig.legends[0].get_texts()]
    return *sides, legend


def test_a_backbone_stage_1_and_stage_2_have_axes_of_their_own(write):
    folders = [
        write("sasrec", *backbone("ce", 8.0, 7.0)),
        write("prompt", *stage_1(2.5, 3.0)),
        write("delrec", *stage_2(1.5, 1.0)),
    ]
    losses, quality, legend = drawn(folders)
    wanted = [[[8.0, 7.0]], [[2.5, 2.5]], [[3.0, 3.0]], [[1.5, 1.0]]]
    assert [lines for (lines,) in losses.values()] == wanted
    stages = ["backbone", "stage 1, TA", "stage 1, RPS", "stage 2"]
    assert [title.split(": ")[0] for title in losses] == [f"loss of {x}" for x in stages]
    # the four validations are of four kinds, and each stands beside its loss
    assert [x for (x,) in quality.values()] == [[[0.31, 0.32]], [[0.4]], [[0.5]], [[0.6]]]
    assert legend == ["sasrec", "prompt", "delrec"]


def test_runs_of_one_name_have_a_curve_each(write, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    names = {
        write("a/sasrec", *backbone("ce", 8.0, 7.0)): "a/sasrec",
        write("b/sasrec", *backbone("ce", 6.0, 5.0)): "b/sasrec",
    }
    logs = logs_of(names)
    assert list(logs) == list(names.values())
    [left, _] = curves_figure(logs).axes
    assert [line.get_ydata().tolist() for line in left.get_lines()] == [[8.0, 7.0], [6.0, 5.0]]


def test_runs_of_the_same_loss_share_axes(write):
    folders = [
        write("sasrec-s0", *backbone("ce", 8.0, 7.0)),
        write("sasrec-s1", *backbone("ce", 8.5, 7.5)),
    ]
    losses, _, legend = drawn(folders)
    assert list(losses.values()) == [[[[8.0, 7.0], [8.5, 7.5]]]]
    assert legend == ["sasrec-s0", "sasrec-s1"]


@pytest.mark.parametrize(
    "other",
    [
        stage_2(9.0, C=100),
        stage_2(9.0, loss="catalogue"),
        stage_2(9.0, loss="both"),
        stage_2(9.0, input="ids"),
        stage_2(9.0, teacher="big"),
    ],
    ids=["more candidates", "all items", "words of titles too", "vectors", "a teacher"],
)
def test_another_loss_of_the_same_stage_has_other_axes(write, other):
    losses, _, _ = drawn([write("one", *stage_2(1.0)), write("other", *other)])
    assert sorted(lines for (lines,) in losses.values()) == [[[1.0]], [[9.0]]]


def test_backbones_with_one_negative_are_not_drawn_with_those_of_all_items(write):
    losses, _, _ = drawn([write("ce", *backbone("ce", 8.0)), write("bce", *backbone("bce", 1.0))])
    assert len(losses) == 2


def test_a_task_that_was_not_asked_has_no_axes(write):
    losses, _, _ = drawn([write("prompt", *stage_1(0.0, 3.0))])
    assert [title.split(":")[0] for title in losses] == ["loss of stage 1, RPS"]


def test_a_log_without_a_loss_draws_nothing(write, tmp_path):
    folder = write("plain", {}, {"name": "SASRec", "step": 0, "val_hr@1_of_15": 0.3})
    assert logs_of({folder: "a", tmp_path / "no log": "b"}) == {}


def test_of_several_learning_rates_the_chosen_one_is_drawn(write):
    """recipes/mlp.py trains at each, one after the other, into one log."""
    entries = [
        {"name": f"lr {lr:g}", "step": i, "loss": 3 + lr, "val_hr@1_of_15": lr}
        for lr, last in ((3e-3, 40), (1e-3, 20), (3e-4, 6))
        for i in range(last + 1)
    ]
    folder = write("mlp", {"stage": "train_backbone", "model": "mlp", "lr": 1e-3}, *entries)
    (log,) = logs_of({folder: "mlp"}).values()
    share, loss = points(log, "loss")
    assert len(share) == 21 and share.max() == 1 and (loss == 3.001).all()
