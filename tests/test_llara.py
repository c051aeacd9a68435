"""finetune.py --input hybrid (LLaRA): titles and vectors, which come batch by batch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from commands import adapter_of, log_of
from kinds import CAPABLE, KINDS, OF_A_KIND, kind_known, kind_titles
from safetensors.torch import load_file, save_file
from toys import popular, write_backbone
from tuning import SMALL, opens_as_stored
from vector_runs import ranker_settings

import finetune
from delrec.lm import items, samples, student
from delrec.lm.ranker import make_ranker
from delrec.lm.text import ITEM


def cfg_of(curriculum, **more):
    """What samples.Histories reads of a run's flags."""
    flags = dict(input="hybrid", C=15, loss="candidates", history=10, seed=0, batch=16)
    rest = dict(order="shuffled", without_fold=None, from_run=None, verbalizer="mean")
    rest |= dict(hint="none", orders=1, pool="stored", draw="uniform", drop_items=0)
    return SimpleNamespace(curriculum=curriculum, **flags | rest | more)


@pytest.fixture
def hybrid(with_items, toy):
    """A ranker of titles and vectors."""
    return make_ranker(with_items, toy, ranker_settings(verbalizer="mean", input="hybrid"))


def shows_vectors(examples):
    """Which examples show a vector (n,)."""
    return np.array([(e.tail <= ITEM).any() for e in examples])


# ---------------------------------------------------------------- when vectors come


def test_vectors_come_batch_by_batch_and_the_more_the_later(hybrid, toy, sasrec):
    seen = samples.Histories(cfg_of("batch"), toy, sasrec, 960)
    shown = ~seen.alone(np.arange(960)).reshape(60, 16)
    assert (shown.all(1) | ~shown.any(1)).all()
    thirds = shown[:, 0].reshape(3, 20).mean(1)
    assert thirds[0] < 0.35 and 0.25 < thirds[1] < 0.75 and thirds[2] > 0.65
    assert not shown[0].any()
    # a step's draw is its own, whoever makes it and whatever was drawn before
    for step in (7, 41):
        at = np.arange(16 * step, 16 * step + 16)
        assert (~seen.alone(at) == shown[step]).all()
        batch = samples.batch_of(seen, hybrid, seen.cfg, at)
        assert (shows_vectors(batch.examples) == shown[step]).all()
        assert batch.rests == (not shown[step, 0])
    other = samples.Histories(cfg_of("batch", seed=1), toy, sasrec, 960)
    assert (~other.alone(np.arange(960)).reshape(60, 16) != shown).any()


def test_without_a_curriculum_vectors_are_there_from_the_first_step(hybrid, toy, sasrec):
    for cfg in (cfg_of("off"), cfg_of(None, from_run="before")):
        seen = samples.Histories(cfg, toy, sasrec, 160)
        batch = samples.batch_of(seen, hybrid, cfg, np.arange(16))
        assert shows_vectors(batch.examples).all() and not batch.rests


@pytest.fixture(scope="module")
def to_run(toy, sasrec, decoder):
    """finetune.py's options of a small hybrid run."""
    return (
        f"--dataset {toy.folder} --llm {decoder} --backbone {sasrec} --soft-prompt none "
        f"--input hybrid {SMALL} --verbalizer mean --no-calibrate --curriculum batch"
    )


def test_the_map_rests_while_no_vector_is_shown(to_run, run, on_cpu, tmp_path, toy, alone):
    """With momentum from a first step a gradient of 0 would move it on."""
    maps, forget = [], student.forget_gradients

    def watched(params):
        params = list(params)
        maps.append([p.detach().clone() for p in params])
        forget(params)

    with pytest.MonkeyPatch.context() as patch:
        # vectors at the first two steps only
        patch.setattr(samples, "draws", lambda seed, kind, x: np.where(x < 2, -1.0, 2.0))
        patch.setattr(student, "forget_gradients", watched)
        run(finetune.main, f"{to_run} --out {tmp_path}/run")
    assert len(maps) == 4
    assert all(torch.equal(p, q) for later in maps[1:] for p, q in zip(maps[0], later))
    kept = load_file(tmp_path / "run" / "items.safetensors")
    assert any(torch.equal(p, kept["in.weight"]) for p in maps[-1])
    opens_as_stored(tmp_path / "run", toy, alone, rtol=1e-3, atol=1e-3)


def test_a_killed_run_goes_on_to_the_bit(to_run, run, on_cpu, tmp_path):
    run(finetune.main, f"{to_run} --out {tmp_path}/whole")
    killed = f"{to_run} --checkpoint-every 1 --out {tmp_path}/killed"
    steps, batch_of = [], samples.batch_of

    def until_the_fourth(*args):
        steps.append(args)
        if len(steps) == 4:
            raise SystemExit(1)
        return batch_of(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "batch_of", until_the_fourth)
        assert CliRunner().invoke(finetune.main, killed.split()).exit_code == 1
    run(finetune.main, f"{killed} --resume")
    for name, tensor in adapter_of(tmp_path / "whole").items():
        assert torch.equal(tensor, adapter_of(tmp_path / "killed")[name])
    one, two = (load_file(tmp_path / n / "items.safetensors") for n in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [x["loss"] for x in log_of(tmp_path / "whole")] == [
        x["loss"] for x in log_of(tmp_path / "killed")
    ]


# ---------------------------------------------------------------- what only vectors say


@pytest.fixture(scope="module")
def signs(tmp_path_factory, make_data):
    """Items of four kinds. In front of each stands a sign of its kind, one of 24 that all have the
    same title: what comes next is in the signs' vectors alone.
    """
    rng, rows = np.random.default_rng(0), []
    n = OF_A_KIND
    for u in range(120):
        kind = rng.integers(4, size=5)
        items = [rng.permutation(n)[:5] + 1 + n * kind, 4 * n + 1 + 6 * np.roll(kind, -1)]
        items[1] += rng.permutation(6)[:5]
        rows += [(u, i, t) for t, i in enumerate(np.stack(items, 1).reshape(-1))]
    titles = dict(enumerate([*kind_titles(), *["Amber"] * 24], 1))
    return make_data(tmp_path_factory.mktemp("signs"), rows, titles, "signs")


@pytest.fixture(scope="module")
def told_by(signs, tmp_path_factory):
    """A backbone whose vector of a sign is its kind's."""
    folder = write_backbone(tmp_path_factory.mktemp("signs") / "sasrec", signs, popular(signs))
    e_IE = torch.zeros(len(KINDS) * (OF_A_KIND + 6) + 1, 4)
    raw_items = (signs.folder / "raw_items.txt").read_text().split()
    for i, raw in enumerate(raw_items, 1):
        if (sign := int(raw) - 1 - 4 * OF_A_KIND) >= 0:
            e_IE[i, sign // 6] = 1
    save_file({"item.weight": e_IE, "bias": torch.zeros(len(e_IE))}, folder / "model.safetensors")
    return folder


def test_the_lm_reads_what_only_the_vectors_say(signs, told_by, decoder, run, on_cpu, tmp_path):
    where = f"--dataset {signs.folder} --llm {decoder} --backbone {told_by}"
    args = f"{where} {CAPABLE} --history 1 --lr-maps 0.03"

    def known(name, options):
        run(finetune.main, f"{args} --out {tmp_path / name} {options}")
        return kind_known(signs, tmp_path / name)

    vectors = "--input hybrid --curriculum off"
    assert known("vectors", vectors) > 0.75
    assert known("permuted", f"{vectors} --permute-vectors") < 0.62


# ---------------------------------------------------------------- what is shown


@pytest.mark.parametrize("verbalizer", ["letter", "likelihood"])
def test_shown_candidates_carry_their_vectors_too(with_items, toy, verbalizer):
    settings = ranker_settings(verbalizer=verbalizer, input="hybrid", show=True)
    r = make_ranker(with_items, toy, settings)
    tail, _ = r.prompts.history([5, 9], np.arange(11, 26))
    assert tail[tail <= ITEM].tolist() == [ITEM - 5, ITEM - 9, *(ITEM - np.arange(11, 26))]
    plain, _ = r.plain.history([5, 9], np.arange(11, 26))
    assert tail[tail > ITEM].tolist() == plain.tolist()


def test_permuted_vectors_are_the_same_ones_at_other_items(with_items):
    E = with_items.items.E
    items.permute(with_items)
    other = with_items.items.E
    same = (other[:, None] == E[None]).all(2)
    assert same[0, 0] and not same[1:].diagonal(1).all() and not same.diagonal()[1:].any()
    assert sorted(map(tuple, other.tolist())) == sorted(map(tuple, E.tolist()))


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--permute-vectors", "--permute-vectors gives items other vectors"),
        ("--curriculum off", "--curriculum says when vectors come"),
        ("--input ids --curriculum batch", "--curriculum says when vectors come"),
    ],
)
def test_flags_about_vectors_are_refused_where_there_are_none(
    flags, said, toy, decoder, refused, on_cpu, tmp_path
):
    where = f"--dataset {toy.folder} --llm {decoder} --out {tmp_path}/f"
    assert said in refused(finetune.main, f"{where} {flags}")
    assert not (tmp_path / "f").exists()
