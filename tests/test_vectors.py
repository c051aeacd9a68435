"""vectors.py: items as vectors of a backbone, from stage 1 that distils into them to stage 2 that
begins there.
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import distill
import evaluate
import finetune
from delrec.data.prepared import users
from delrec.evaluation.paper import paper_method
from delrec.lm import items, windows
from delrec.lm.model import load_lm
from delrec.lm.ranker import make_ranker, open_run
from delrec.lm.text import ITEM, MASK, embed, random_soft_prompt
from delrec.runtime import load_run, write_json
from delrec.training import checkpoints

IDS = [
    "--input",
    "ids",
    "--history",
    6,
    "--a",
    3,
    "--h",
    3,
    "--candidates",
    10,
    "--k",
    4,
    "--batch",
    8,
    "--micro",
    4,
    "--val-samples",
    20,
    "--seed",
    0,
]
TUNE = [
    "--input",
    "ids",
    "--history",
    6,
    "--batch",
    8,
    "--micro",
    4,
    "--samples",
    48,
    "--evals",
    1,
    "--val-samples",
    20,
    "--init-r",
    4,
    "--target-r",
    2,
    "--dropout",
    0,
]


def test_item_vectors_are_the_backbone_s_and_stand_where_the_titles_stood(load, toy, sasrec):
    m = load("decoder")
    try:
        items.load_items(m, sasrec, 60)
        weights = load_file(sasrec / "model.safetensors")
        e, b = weights["item.weight"][1:], weights["bias"][1:]
        assert m.items.E.shape == (61, 17) and not m.items.E[0].any()
        torch.testing.assert_close(F.cosine_similarity(m.items.E[1:, :16], e), torch.ones(60))
        assert np.corrcoef(m.items.E[1:, 16], b)[0, 1] > 0.999
        r = make_ranker(
            m,
            toy,
            {
                "verbalizer": "items",
                "show": False,
                "history": 6,
                "max_title": 32,
                "max_tokens": 1000,
                "backbone": "SASRec",
                "order": "shuffled",
                "backbone_run": "",
                "input": "ids",
            },
        )
        tail, at = r.prompts.history(np.array([5, 9, 60]))
        assert (
            tail[at[:3]].tolist() == [ITEM - 5, ITEM - 9, ITEM - 60]
            and tail[-1] == MASK
            and len(tail) == 5
        )
        e = embed(m, torch.from_numpy(tail)[None, :-1], None)[0]
        torch.testing.assert_close(e[1:], m.items.maps["in"](m.items.E[[5, 9, 60]]))
        torch.testing.assert_close(e[0], m.model.get_input_embeddings().weight[tail[0]])
        both = make_ranker(
            m,
            toy,
            {
                "verbalizer": "mean",
                "show": False,
                "history": 6,
                "max_title": 32,
                "max_tokens": 1000,
                "backbone": "SASRec",
                "order": "shuffled",
                "backbone_run": "",
                "input": "hybrid",
            },
        )
        tail, plain = (
            both.prompts.history(np.array([5, 9]))[0],
            both.plain.history(np.array([5, 9]))[0],
        )
        # LLaRA: the title, then its vector
        assert tail[tail > ITEM].tolist() == plain.tolist() and (tail <= ITEM).sum() == 2
    finally:
        m.items = None


def test_windows_meet_every_training_target_once_an_epoch_and_never_see_it(toy):
    r = SimpleNamespace(
        data=toy,
        history=6,
        prompts=SimpleNamespace(
            history=lambda items: (np.r_[0, ITEM - items, MASK], np.arange(1, len(items) + 1))
        ),
    )
    first, last = windows.draw_windows(toy, 6, 500, 0)
    is_target = np.zeros(len(toy.items), bool)
    is_target[toy.train] = True
    count, seen = 0, []
    for f, end, e in zip(first, last, windows.window_prompts(r, first, last, is_target)):
        user = users(toy, np.array([end]))[0]
        assert e.target[0] == toy.items[end] and len(e.target) == len(e.at) + 1
        assert (
            e.place[0] == end
            and (toy.items[e.place] == e.target).all()
            and (np.diff(e.place[1:]) > 0).all()
        )
        # what a target may see: what came before it
        whole = toy.items[toy.ptr[user] : end + 1].tolist()
        for place, target in zip(e.at, e.target[1:]):
            # the state before the vector of the target predicts it
            assert e.tail[place] == ITEM - target
        assert (ITEM - e.tail[1:-1]).tolist() == whole[-len(e.tail) + 1 : -1]
        count += len(e.target)
        seen += range(f, end + 1)
        if count == len(toy.train):
            break
    assert sorted(set(seen) & set(toy.train.tolist())) == sorted(
        toy.train.tolist()
    ) and count == len(toy.train)


# ---------------------------------------------------------------- stage 1 on vectors


def test_the_list_s_loss_is_plackett_luce():
    s = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ranked = torch.stack(
        [torch.randperm(12, generator=torch.Generator().manual_seed(i))[:4] + 1 for i in range(5)]
    )
    want = []
    for row, listed in zip(s, ranked):
        left, terms = list(range(12)), []
        for item in (listed - 1).tolist():  # draw one, put it aside, draw the next
            terms.append(row[left].logsumexp(0) - row[item])
            left.remove(item)
        want.append(torch.stack(terms).mean())
    torch.testing.assert_close(distill.listwise(s, ranked), torch.stack(want))
    torch.testing.assert_close(
        distill.listwise(s, ranked[:, :1]), F.cross_entropy(s, ranked[:, 0] - 1, reduction="none")
    )
    # a list of the whole catalogue
    every = torch.stack(
        [torch.randperm(12, generator=torch.Generator().manual_seed(i)) + 1 for i in range(5)]
    )
    assert torch.isfinite(distill.listwise(s, every)).all()
    best = s.argsort(1, descending=True)[:, :4] + 1
    assert (distill.listwise(s, best) < distill.listwise(s, best.flip(1))).all()


def test_a_prompt_of_vectors_tells_nothing_of_the_list_and_hides_the_item_that_is_asked(
    load, toy, sasrec
):
    m = load("decoder")
    try:
        items.load_items(m, sasrec, 60)
        p = make_ranker(
            m,
            toy,
            {
                "verbalizer": "items",
                "show": False,
                "history": 8,
                "max_title": 32,
                "max_tokens": 1000,
                "backbone": "SASRec",
                "order": "shuffled",
                "backbone_run": "",
                "input": "ids",
            },
        ).prompts
        window = np.array([3, 9, 14, 27, 31, 40, 52])

        def shown(tail):
            return (ITEM - tail[tail <= ITEM]).tolist()

        assert shown(p.pattern(window, np.array([1, 2, 5]))[0]) == window.tolist()
        # i_1..i_{a-2}; i_a, i_{a-1}; i_a..i_{n-2}; i_n: and i_{n-1} = 40 is asked
        assert shown(p.temporal_analysis(window, 4)[0]) == [3, 9, 27, 14, 27, 31, 52]
    finally:
        m.items = None


@pytest.fixture(scope="module")
def planted(toy, sasrec, make_backbone, tmp_path_factory):
    """A backbone with SASRec's vectors whose list begins with the next number after the last item:
    a rule that is in no title and no sequence.
    """

    def score(samples):
        last = toy.items[np.asarray(samples) - 1].astype(int)
        return -((np.arange(toy.n_items + 1)[None] - last[:, None] - 1) % toy.n_items).astype(float)

    folder = make_backbone(tmp_path_factory.mktemp("planted") / "rule", toy, score)
    shutil.copy(sasrec / "model.safetensors", folder)
    return folder


@pytest.fixture(scope="module")
def distilled(toy, planted, decoder, script, fp32, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled") / "prompt"
    with fp32():
        script(
            distill.main,
            "--dataset",
            toy.folder,
            "--backbone",
            planted,
            "--llm",
            decoder,
            "--out",
            folder,
            *IDS,
            "--tasks",
            "rps",
            "--samples",
            1600,
            "--lr",
            0.02,
            "--lr-maps",
            0.01,
            "--evals",
            3,
        )
    return folder


def test_prompt_and_maps_learn_the_backbone_s_list_of_a_frozen_lm(
    distilled, planted, toy, decoder, sasrec, script, on_cpu, tmp_path
):
    result = json.loads((distilled / "metrics.json").read_text())
    # chance .1
    assert result["before"]["rps"] < 0.3 and result["after"]["rps"] > 0.6
    run = load_run(distilled, toy, ["distill"])
    r, _ = open_run(run, toy, torch.device("cpu"))
    fresh = load_lm(decoder, torch.device("cpu"))
    # the LM itself did not move
    assert all(torch.equal(p, q) for p, q in zip(r.lm.model.parameters(), fresh.model.parameters()))
    assert not torch.equal(r.P, random_soft_prompt(fresh, 4, 0))
    items.load_items(fresh, sasrec, 60)
    # nor did the backbone's vectors
    assert torch.equal(fresh.items.E, r.lm.items.E)
    # without learning rates nothing is learnt
    script(
        distill.main,
        "--dataset",
        toy.folder,
        "--backbone",
        planted,
        "--llm",
        decoder,
        "--out",
        tmp_path / "still",
        *IDS,
        "--tasks",
        "rps",
        "--samples",
        40,
        "--lr",
        1e-20,
        "--lr-maps",
        1e-20,
    )
    result = json.loads((tmp_path / "still" / "metrics.json").read_text())
    assert result["after"]["rps"] == pytest.approx(result["before"]["rps"], abs=0.01)


def test_each_read_is_taught_the_list_of_its_own_place(
    toy, planted, decoder, script, on_cpu, tmp_path, monkeypatch
):
    listwise, rule, rows = distill.listwise, lambda items: items % toy.n_items + 1, []

    def checked(s_NI, ranked_Nh):
        rows.append(ranked_Nh)
        return listwise(s_NI, ranked_Nh)

    examples, before = windows.window_prompts, []
    monkeypatch.setattr(distill, "listwise", checked)
    monkeypatch.setattr(
        windows, "window_prompts", lambda *args: before.append(examples(*args)) or before[-1]
    )
    script(
        distill.main,
        "--dataset",
        toy.folder,
        "--backbone",
        planted,
        "--llm",
        decoder,
        "--out",
        tmp_path / "p",
        *IDS,
        "--samples",
        16,
        "--micro",
        8,
        "--evals",
        1,
    )
    for batch, ranked in zip(before, rows):
        place = windows.targets_of(batch, "place")
        seen = [set(toy.items[toy.ptr[users(toy, np.array([p]))[0]] : p].tolist()) for p in place]
        first = [
            next(i for i in (rule(n) for n in range(last - 1 + 1, last + 60)) if i not in old)
            for last, old in zip(toy.items[place - 1], seen)
        ]
        assert ranked[:, 0].tolist() == first
    assert len(rows) == 2


def test_stage_2_begins_with_the_maps_that_stage_1_left(
    distilled, toy, planted, decoder, script, on_cpu, tmp_path
):
    def start(name, *more):
        script(
            finetune.main,
            "--dataset",
            toy.folder,
            "--llm",
            decoder,
            "--out",
            tmp_path / name,
            *TUNE,
            "--lr",
            1e-9,
            "--lr-maps",
            1e-9,
            "--weight-decay",
            0,
            *more,
        )
        return load_file(tmp_path / name / "items.safetensors"), json.loads(
            (tmp_path / name / "log.jsonl").read_text().splitlines()[0]
        )["loss"]

    given = load_file(distilled / "items.safetensors")
    kept, loss = start("both", "--soft-prompt", distilled)
    for name in given:
        torch.testing.assert_close(kept[name], given[name], rtol=0, atol=1e-6)
    kept, other = start("neither", "--soft-prompt", "none", "--backbone", planted)
    assert not torch.allclose(
        kept["out.weight"], given["out.weight"], atol=1e-3
    ) and other != pytest.approx(loss, rel=1e-3)
    # the maps without the prompt
    kept, other = start("maps", "--soft-prompt", "none", "--backbone", planted, "--maps", distilled)
    torch.testing.assert_close(kept["out.weight"], given["out.weight"], rtol=0, atol=1e-6)
    assert not (tmp_path / "maps" / "soft_prompt.safetensors").exists() and other != pytest.approx(
        loss, rel=1e-3
    )
    assert [
        paper_method(load_run(tmp_path / name, toy)) for name in ("both", "neither", "maps")
    ] == ["w/o TA", "w/o SP", None]


def test_a_prompt_of_vectors_ranks_the_catalogue_without_stage_2(
    distilled, planted, toy, script, on_cpu, tmp_path
):
    script(
        evaluate.main,
        "--ckpt",
        planted,
        distilled,
        "--out",
        tmp_path / "table",
        "--val-samples",
        20,
    )
    table = json.loads((tmp_path / "table" / "metrics.json").read_text())
    assert (
        distilled.name in table["full"]
        and np.isfinite(np.load(distilled / "scores_test_15.npy")).all()
    )
    mine, theirs = (
        np.load(distilled / "scores_test_15.npy"),
        np.load(planted / "scores_test_15.npy"),
    )
    # among 15 others too it often chooses as the backbone does; chance .07
    assert (mine.argmax(1) == theirs.argmax(1)).mean() > 0.3


def test_one_process_and_two_distil_the_same(
    toy, planted, decoder, script, on_cpu, two_processes, tmp_path
):
    args = [
        "--dataset",
        toy.folder,
        "--backbone",
        planted,
        "--llm",
        decoder,
        *IDS,
        "--samples",
        32,
        "--evals",
        1,
        "--lr",
        0.01,
    ]
    script(distill.main, *args, "--out", tmp_path / "one")
    two_processes([("distill", [*args, "--out", tmp_path / "two"])])
    for name in ("soft_prompt.safetensors", "items.safetensors"):
        one, two = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-5)


def test_a_killed_stage_1_goes_on_exactly(toy, planted, decoder, script, on_cpu, tmp_path):
    args = [
        "--dataset",
        toy.folder,
        "--backbone",
        planted,
        "--llm",
        decoder,
        *IDS,
        "--samples",
        48,
        "--evals",
        2,
        "--lr",
        0.01,
        "--checkpoint-every",
        1,
    ]
    script(distill.main, *args, "--out", tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        save = checkpoints.Saver.save

        def save_and_die(self, step, *rest):
            save(self, step, *rest)
            if step == 3:
                raise KeyboardInterrupt

        patch.setattr(checkpoints.Saver, "save", save_and_die)
        CliRunner().invoke(distill.main, [str(a) for a in (*args, "--out", tmp_path / "cut")])
    assert not (tmp_path / "cut" / "config.json").exists()
    torch.manual_seed(99)
    # a backbone trained again in its place is another one
    for name, says in (
        ("model.safetensors", "item-vectors was"),
        ("topk_train.npy", "backbone-lists was"),
    ):
        kept = (planted / name).read_bytes()
        try:
            if name == "topk_train.npy":
                np.save(planted / name, np.load(planted / name)[:, ::-1])
            else:
                weights = load_file(planted / name)
                save_file(
                    weights
                    | {"item.weight": weights["item.weight"] * torch.linspace(1, 2, 61)[:, None]},
                    planted / name,
                )
            assert (
                says
                in script(distill.main, *args, "--out", tmp_path / "cut", "--resume", code=1).error
            )
        finally:
            (planted / name).write_bytes(kept)
    script(distill.main, *args, "--micro", "auto", "--out", tmp_path / "auto")
    assert load_run(tmp_path / "auto").micro >= 1
    script(distill.main, *args, "--out", tmp_path / "cut", "--resume")
    for name in ("soft_prompt.safetensors", "items.safetensors"):
        whole, cut = load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)
        assert all(torch.equal(whole[key], cut[key]) for key in whole), name


def test_what_cannot_be_is_refused(
    toy,
    planted,
    backbone,
    sasrec,
    distilled,
    decoder,
    encoder,
    make_backbone,
    script,
    on_cpu,
    tmp_path,
):
    def stage_1(*args):
        return script(
            distill.main, "--dataset", toy.folder, "--out", tmp_path / "p", *IDS, *args, code=1
        ).error

    assert "needs a decoder-only LM" in stage_1("--backbone", planted, "--llm", encoder)
    assert "there is no" in stage_1(
        "--backbone", backbone, "--llm", decoder
    ) and "train_backbone.py" in stage_1("--backbone", backbone, "--llm", decoder)
    assert not (tmp_path / "p").exists()
    partly = shutil.copytree(planted, tmp_path / "partly")
    lists = np.load(partly / "topk_train.npy")
    lists[::2] = 0
    np.save(partly / "topk_train.npy", lists)
    assert (
        f"lists {len(lists) // 2} of {len(lists)} training samples: train it again with --lists "
        f"{len(lists)}" in stage_1("--backbone", partly, "--llm", decoder)
    )

    def stage_2(*args):
        return script(
            finetune.main,
            "--dataset",
            toy.folder,
            "--llm",
            decoder,
            "--out",
            tmp_path / "f",
            *args,
            code=1,
        ).error

    assert "was distilled on item vectors, --input is titles" in stage_2(
        "--soft-prompt", distilled, "--samples", 48, "--batch", 8
    )
    assert "--maps begins the maps of item vectors, but --input is titles" in stage_2(
        "--soft-prompt",
        "none",
        "--backbone",
        planted,
        "--maps",
        distilled,
        "--samples",
        48,
        "--batch",
        8,
    )
    other = shutil.copytree(planted, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"bias": weights["bias"] + torch.arange(61)}, other / "model.safetensors")
    assert "the item vectors of another backbone" in stage_2(
        *TUNE, "--soft-prompt", "none", "--maps", distilled, "--backbone", other
    )
    assert f"was distilled from {planted}, --backbone is {other}" in stage_2(
        *TUNE, "--soft-prompt", distilled, "--backbone", other
    )
    assert "--loss is about titles" in stage_2(
        *TUNE, "--soft-prompt", distilled, "--loss", "titles"
    )
    assert "--maps and --teacher both say" in stage_2(
        *TUNE, "--maps", distilled, "--teacher", distilled
    )
    config = json.loads((other / "config.json").read_text())
    write_json(other / "config.json", config | {"data_hash": "0123456789abcdef"})
    # what it has seen is not known
    assert "another preparation" in stage_2(*TUNE, "--soft-prompt", "none", "--backbone", other)
    assert not (tmp_path / "f").exists()
