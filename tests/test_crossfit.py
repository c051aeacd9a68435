"""crossfit.py: LMs that were trained without a part of the users, and the export they make."""

import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import edit_config
from safetensors.torch import load_file, save_file
from stopped_runs import killed_at
from vector_runs import SMALL

import distill
import evaluate
import finetune
import train_backbone
from delrec.backbone import dllm2rec
from delrec.data.prepared import histories, users
from delrec.lm import crossfit, export
from delrec.lm.items import item_vectors, show_fold
from delrec.lm.ranker import open_run, score_catalogue
from delrec.lm.reading import read_prefix
from delrec.lm.samples import Histories
from delrec.lm.student import samples_of
from delrec.runtime import load_run, read_json

CPU = torch.device("cpu")
N = 40  # items: two rings of 20
LEARN = (
    "--input ids --history 6 --batch 16 --micro 16 --samples 1600 --val-samples 20 --evals 1 "
    "--init-r 6 --target-r 4 --dropout 0 --lr 0.01 --lr-maps 0.01 --soft-prompt none"
)


@pytest.fixture(scope="module")
def rings(make_data, tmp_path_factory):
    """90 users: a third of them steps on a ring of 20 items to the next one, the others on another
    ring by 7.
    """
    rng, rows = np.random.default_rng(0), []
    for u in range(90):
        start, (first, step) = int(rng.integers(20)), (1, 1) if u % 3 == 0 else (21, 7)
        rows += [(u, first + (start + step * t) % 20, u + 10 * t) for t in range(14)]
    titles = {i: f"Film {i}" for i in range(1, N + 1)}
    return make_data(tmp_path_factory.mktemp("rings"), rows, titles, "rings")


def numbers_of(data) -> np.ndarray:
    """The number of each item in its title (N+1,)."""
    return np.array([0, *(int(t.split()[1]) for t in data.titles[1:])])


def fold_of_users(data) -> np.ndarray:
    """The fold of each user: 0 on the first rings, 1 and 2 in turn on the second."""
    on_first_U = numbers_of(data)[data.items[data.ptr[:-1]]] <= 20
    return np.where(on_first_U, 0, 1 + np.arange(data.n_users) % 2)


@pytest.fixture(scope="module")
def planted(rings, make_backbone, tmp_path_factory):
    """A backbone whose item vectors stand on two rings, with three folds of users. The vectors of
    each fold differ a little from those of all: an LM that is shown others says other numbers.
    """
    folder = tmp_path_factory.mktemp("planted") / "sasrec"
    make_backbone(folder, rings, lambda samples: np.ones((len(samples), N + 1)))
    number = torch.from_numpy(numbers_of(rings))
    angle_IF = 2 * torch.pi / 20 * number[:, None] * torch.arange(1, 5)
    ring_IF = torch.cat([angle_IF.cos(), angle_IF.sin()], 1)
    first_I1 = (number <= 20).float()[:, None]
    e_IE = torch.cat([ring_IF * first_I1, ring_IF * (1 - first_I1)], 1)
    e_IE[0] = 0
    bias_I = torch.linspace(-0.01, 0.01, N + 1)
    save_file({"item.weight": e_IE, "bias": bias_I}, folder / "model.safetensors")
    noise = 0.02 * torch.randn(3, *e_IE.shape, generator=torch.Generator().manual_seed(0))
    folds = {
        "fold": torch.from_numpy(fold_of_users(rings)),
        "item.weight": e_IE + noise,
        "bias": bias_I.expand(3, -1).contiguous(),
    }
    save_file(folds, folder / "folds.safetensors")
    return folder


@pytest.fixture(scope="module")
def tune(rings, planted, decoder, run, fp32, tmp_path_factory):
    """tune(name, options) -> the run of finetune.py on the rings, made once."""
    home, made = tmp_path_factory.mktemp("tuned"), {}

    def get(name, options=""):
        if name not in made:
            made[name] = home / name
            base = f"--dataset {rings.folder} --llm {decoder} --backbone {planted} {LEARN}"
            with fp32():
                run(finetune.main, f"{base} {options} --out {made[name]}")
        return made[name]

    return get


@pytest.fixture(scope="module")
def full(tune):
    """An LM that was trained on all users."""
    return tune("full")


@pytest.fixture(scope="module")
def halves(tune):
    """An LM without fold 0, and one without the folds 1 and 2."""
    return tune("without-0", "--without-fold 0"), tune(
        "without-1-2", "--without-fold 1 --without-fold 2"
    )


@pytest.fixture(scope="module")
def crossed(full, halves, run, fp32, tmp_path_factory):
    """The full run with an export that the halves answer."""
    copy = shutil.copytree(full, tmp_path_factory.mktemp("crossed") / "full")
    with fp32():
        command = f"--ckpt {copy} --export --export-k 5 --folds {halves[0]} {halves[1]}"
        said = run(evaluate.main, command)
    return SimpleNamespace(folder=copy, said=said.output)


def truth_first(folder, data, fold) -> float:
    """How often an export lists the truth first for the training samples of a fold's users."""
    own = fold_of_users(data)[users(data, data.train)] == fold
    topk = np.load(folder / "export" / "topk.npy")
    return float((topk[own, 0] == data.items[data.train[own]]).mean())


# ---------------------------------------------------------------- who has seen whom


def test_no_user_of_a_left_out_fold_is_trained_on(rings, planted):
    cfg = SimpleNamespace(without_fold=[1], input="ids", history=6, seed=0, order="shuffled")
    vars(cfg).update(hint="none", pool="stored", draw="uniform")
    lm = SimpleNamespace(kind="decoder")
    r = SimpleNamespace(data=rings, lm=lm, backbone_run=planted)
    fold_U = fold_of_users(rings)
    windows = samples_of(cfg, r, 300)
    assert set(fold_U[users(rings, windows.first_n)]) == {0, 2}
    assert set(fold_U[users(rings, np.flatnonzero(windows.is_target))]) == {0, 2}
    assert (windows.n_reads > 0).all()
    one_by_one = Histories(cfg, rings, planted, 5000)
    assert set(fold_U[users(rings, one_by_one.places)]) == {0, 2}
    # all of theirs, and the same samples as ever where nobody is left out
    rest = fold_U[users(rings, rings.train)] != 1
    assert set(one_by_one.which) == set(np.flatnonzero(rest))
    everybody = Histories(
        SimpleNamespace(**vars(cfg) | {"without_fold": None}), rings, planted, 500
    )
    order = np.random.default_rng([0, 1]).permutation(len(rings.train))
    assert (everybody.which == order[:500]).all()


def test_an_lm_that_has_not_seen_a_user_does_not_know_what_only_it_does(full, crossed, rings, run):
    # only the users of fold 0 are on the first rings: whoever is trained without them knows nothing
    in_sample = shutil.copytree(full, crossed.folder.parent / "in-sample")
    run(evaluate.main, f"--ckpt {in_sample} --export --export-k 5")
    assert truth_first(in_sample, rings, 0) > 0.6
    assert truth_first(crossed.folder, rings, 0) < 0.2
    # the run that left out the folds 1 and 2 has seen nobody on the second
    assert truth_first(in_sample, rings, 1) > 0.6
    assert truth_first(crossed.folder, rings, 1) < 0.2


def test_each_sample_is_answered_by_the_run_and_the_vectors_of_its_fold(
    crossed, halves, planted, rings, on_cpu
):
    topk = np.load(crossed.folder / "export" / "topk.npy")
    truth = np.load(crossed.folder / "export" / "truth.npy")
    fold_n = fold_of_users(rings)[users(rings, rings.train)]
    for fold, half in ((0, halves[0]), (1, halves[1]), (2, halves[1])):
        answers = load_run(half, rings)
        r, penalty_I = open_run(answers, rings, CPU)
        show_fold(r.lm, answers, fold)
        assert not torch.equal(r.lm.items.E, item_vectors(planted, N))
        start = read_prefix(r.lm, r.prompts.prefix, None)
        for n in np.flatnonzero(fold_n == fold)[[0, 17, -1]]:
            old = histories(rings, rings.train[[n]], 20)[0]
            old = old[old > 0]
            s = score_catalogue(r, start, [r.prompts.history(old[-6:])[0]])[0] - penalty_I
            p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
            assert truth[n] == pytest.approx(p[rings.items[rings.train[n]]], rel=1e-3)
            s[old] = -np.inf
            assert topk[n].tolist() == np.argsort(-s, kind="stable")[:5].tolist()


def test_the_export_and_its_student_say_that_it_is_out_of_fold(
    crossed, full, halves, rings, run, on_cpu, tmp_path
):
    answered = read_json(crossed.folder / "export" / "meta.json")["out_of_fold"]
    assert {k: v["without_fold"] for k, v in answered.items()} == {
        str(halves[0]): [0],
        str(halves[1]): [1, 2],
    }
    train = f"--dataset {rings.folder} --epochs 1 --width 8 --lam 0.1"
    said = run(train_backbone.main, f"{train} --teacher {crossed.folder} --out {tmp_path}/a")
    assert "the teacher's lists are out of fold" in said.output
    assert load_run(tmp_path / "a").teacher_out_of_fold
    usual = shutil.copytree(full, tmp_path / "full")
    run(evaluate.main, f"--ckpt {usual} --export --export-k 5")
    said = run(train_backbone.main, f"{train} --teacher {usual} --out {tmp_path}/b")
    assert "the teacher's lists are in sample" in said.output
    assert not load_run(tmp_path / "b").teacher_out_of_fold
    cfg = SimpleNamespace(w_position=0.3, w_confidence=0.5, confidence="truth", temperature=1.0)
    cfg.lam = 0.1
    assert dllm2rec.read_export(str(crossed.folder), rings, cfg).out_of_fold


# ---------------------------------------------------------------- killed, asked again


@pytest.fixture
def of_export(halves):
    """Options of an export that the halves answer."""
    folds = tuple(map(str, halves))
    return SimpleNamespace(export_k=5, limit=0, shard=False, overwrite=False, folds=folds)


def test_a_killed_export_goes_on_in_the_middle_of_a_fold(
    full, crossed, of_export, rings, alone, on_cpu, tmp_path, monkeypatch
):
    trained = load_run(shutil.copytree(full, tmp_path / "full"), rings)
    monkeypatch.setattr(export, "CHUNK", 150)
    work = partial(export.export, trained, rings, alone, of_export)
    written = killed_at(monkeypatch, export, 4, work)
    size = np.bincount(fold_of_users(rings)[users(rings, rings.train)])
    assert size[0] < written[-1]["done"] < size[:2].sum()
    work()
    for name in ("topk", "truth", "listed", "titles"):
        one, two = (np.load(f / "export" / f"{name}.npy") for f in (crossed.folder, trained.folder))
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)


def test_an_export_in_sample_is_not_taken_for_one_out_of_fold(full, halves, run, on_cpu, tmp_path):
    copy = shutil.copytree(full, tmp_path / "full")
    run(evaluate.main, f"--ckpt {copy} --export --export-k 5 --limit 40")
    folds = f"--export --export-k 5 --limit 40 --folds {halves[0]} --folds {halves[1]}"
    said = run(evaluate.main, f"--ckpt {copy} {folds}", code=1).error
    assert "--overwrite" in said
    run(evaluate.main, f"--ckpt {copy} {folds} --overwrite")
    assert "is complete" in run(evaluate.main, f"--ckpt {copy} {folds}").output


# ---------------------------------------------------------------- refusals


def test_runs_that_cannot_answer_for_everybody_are_refused(
    full, halves, rings, planted, refused, on_cpu, tmp_path
):
    def says(*folds):
        folds = " ".join(map(str, folds))
        return refused(evaluate.main, f"--ckpt {full} --export --folds {folds}")

    assert "without the users of fold 1, 2" in says(halves[0])
    assert "was trained on all users" in says(full, *halves)
    other = edit_config(shutil.copytree(halves[0], tmp_path / "a"), backbone_digest="0" * 16)
    assert "the folds of another backbone" in says(other, halves[1])
    other = edit_config(shutil.copytree(halves[0], tmp_path / "b"), folds_digest="0" * 16)
    assert "the folds of another backbone" in says(other, halves[1])
    # all that shapes a prompt must be alike, told or not
    asked = {"history": 5, "instruct": True, "max_title": 8, "max_tokens": 99, "hint": "backbone"}
    other = shutil.copytree(halves[0], tmp_path / "c")
    for key, value in asked.items():
        edit_config(other, settings=load_run(halves[0]).settings | {key: value})
        assert f"trained with {key} {value}" in says(other, halves[1])
    assert "add --export" in refused(evaluate.main, f"--ckpt {full} --folds {halves[0]}")


def test_folds_that_cannot_be_left_out_are_refused(
    full, halves, rings, planted, sasrec, toy, decoder, refused, on_cpu, tmp_path
):
    base = f"--llm {decoder} --input ids {SMALL} --out {tmp_path}/x"
    ours = f"--dataset {rings.folder} --backbone {planted} {base}"
    says = refused(finetune.main, f"--dataset {toy.folder} --backbone {sasrec} {base} "
                                  "--without-fold 0")  # fmt: skip
    assert "has no folds of users" in says
    assert "has the folds 0 to 2" in refused(finetune.main, f"{ours} --without-fold 3")
    every = "--without-fold 0 --without-fold 1 --without-fold 2"
    assert "not all" in refused(finetune.main, f"{ours} {every}")
    # what the run learns from must not have seen them either
    says = refused(finetune.main, f"{ours} --teacher {full} --layers 1 --without-fold 0")
    assert "has seen the users of fold 0" in says
    says = refused(finetune.main, f"{ours} --maps {halves[0]} --without-fold 0 --without-fold 1")
    assert "has seen the users of fold 1" in says


def test_a_soft_prompt_is_distilled_without_a_fold_too(
    rings, planted, decoder, run, refused, on_cpu, tmp_path
):
    base = f"--dataset {rings.folder} --backbone {planted} --llm {decoder} --input ids --history 6"
    one = "--k 4 --a 3 --h 3 --candidates 10 --batch 8 --micro 4 --samples 48 --val-samples 20"
    run(distill.main, f"{base} {one} --evals 1 --without-fold 0 --out {tmp_path}/prompt")
    assert load_run(tmp_path / "prompt").without_fold == [0]
    tuned = f"{base} {SMALL} --soft-prompt {tmp_path}/prompt --out {tmp_path}/x"
    says = refused(finetune.main, f"{tuned} --without-fold 1")
    assert "has seen the users of fold 1" in says
    run(finetune.main, f"{tuned} --without-fold 0")
    fold = load_file(planted / "folds.safetensors")["fold"]
    assert load_run(tmp_path / "x").folds_digest == crossfit.folds_digest(fold.numpy())
