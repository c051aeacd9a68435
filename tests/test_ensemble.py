"""finetune.py --kd: an LM that learns what conventional models say of all items, out of fold."""

import shutil
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import log_of, same_run
from safetensors.torch import load_file, save_file
from stopped_runs import goes_on_to_the_last_bit

import finetune
import train_backbone
from delrec.backbone.ranking import history_scorer
from delrec.data.prepared import halves_of_validation, histories, users
from delrec.evaluation.paper import paper_method
from delrec.evaluation.rows import tuning_notes
from delrec.lm import counted, ensemble
from delrec.lm.ranker import open_run, score_and_rank
from delrec.lm.student import samples_of
from delrec.runtime import load_run
from delrec.serving.commands import command_of, made_by, name_of

CPU = torch.device("cpu")
N, FOLLOWERS = 40, 6
YOUNG = "--epochs 2 --patience 9 --width 40 --batch 16 --history 8 --folds 3"
SMALL = (
    "--input ids --history 6 --batch 16 --micro 16 --val-samples 0 --init-r 4 --target-r 2 "
    "--dropout 0 --soft-prompt none"
)
LEARN = "--samples 480 --evals 1 --lr 3e-3 --lr-maps 1e-2"
SHORT = "--samples 96 --evals 1"


@pytest.fixture(scope="module")
def chances():
    """P (N+1, N+1): after each item comes one of six; one step in twenty goes anywhere."""
    rng, P = np.random.default_rng(1), np.full((N + 1, N + 1), 0.05 / N)
    for i in range(1, N + 1):
        P[i, 1 + rng.permutation(N)[:FOLLOWERS]] += 0.95 / FOLLOWERS
    P[:, 0] = 0
    return P / P.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def crowd(chances, make_data, tmp_path_factory):
    """60 users of 12 steps by these chances: a next item alone says little of them."""
    rng, rows = np.random.default_rng(0), []
    for u in range(60):
        item = int(rng.integers(1, N + 1))
        for t in range(12):
            rows.append((u, item, u + 10 * t))
            item = int(rng.choice(N + 1, p=chances[item]))
    titles = {i: f"Film {i}" for i in range(1, N + 1)}
    return make_data(tmp_path_factory.mktemp("crowd"), rows, titles, "crowd")


@pytest.fixture(scope="module")
def young(crowd, run, tmp_path_factory):
    """A SASRec that was trained too little, with folds."""
    out = tmp_path_factory.mktemp("young") / "sasrec"
    run(train_backbone.main, f"--dataset {crowd.folder} --model sasrec --out {out} {YOUNG}")
    return out


@pytest.fixture(scope="module")
def knowing(crowd, chances, young, tmp_path_factory):
    """A backbone's run whose every fold knows the chances: a state names the last item."""
    folder = shutil.copytree(young, tmp_path_factory.mktemp("knowing") / "knowing")
    last_n = crowd.items[crowd.train - 1]
    np.save(folder / "states_train.npy", np.eye(N + 1, dtype=np.float16)[last_n])
    fold_U = load_file(young / "folds.safetensors")["fold"]
    e_IE = torch.from_numpy(np.log(np.maximum(chances, 1e-9)).T.copy()).float()
    vectors = torch.stack([e_IE] * 3)
    tensors = {"fold": fold_U, "item.weight": vectors, "bias": torch.zeros(3, N + 1)}
    save_file(tensors, folder / "folds.safetensors")
    return folder


@pytest.fixture(scope="module")
def command(crowd, young, decoder):
    """command(options) -> finetune.py's options on the young backbone, without --out."""
    where = f"--dataset {crowd.folder} --llm {decoder} --backbone {young} {SMALL}"
    return lambda options: f"{where} {options}"


def teachers_of(data, kd, **more):
    """The ensemble that flags name."""
    cfg = dict(kd=[str(name) for name in kd], kd_weight=0.5, kd_temp=1.0, kd_permute=False)
    cfg |= dict(without_fold=None, residual=None) | more
    r = SimpleNamespace(data=data, lm=SimpleNamespace(device=CPU), backbone_run="none")
    return ensemble.opened(SimpleNamespace(**cfg), r)


# ---------------------------------------------------------------- the equations


def scores_by_hand(data, folder, n):
    """y (I,) fp64 of the training sample number n by the model that has not seen its user."""
    t = load_file(folder / "folds.safetensors")
    fold = int(t["fold"][users(data, data.train[[n]])[0]])
    x = np.load(folder / "states_train.npy")[n].astype(np.float64)
    return (t["item.weight"][fold].double().numpy() @ x + t["bias"][fold].double().numpy())[1:]


def counts_by_hand(data, folder, n):
    """The same of co-occurrence: every pair within five steps of the training parts of users of
    other folds, over the root of both counts.
    """
    fold_U = load_file(folder / "folds.safetensors")["fold"].numpy()
    place = data.train[n]
    own = fold_U[users(data, data.train[[n]])[0]]
    pair_II, count_I = np.zeros((N + 1, N + 1)), np.zeros(N + 1)
    for u in np.flatnonzero(fold_U != own):
        trained = data.train[users(data, data.train) == u]
        seq = data.items[data.ptr[u] : trained.max() + 1] if len(trained) else []
        for i, a in enumerate(seq):
            count_I[a] += 1
            for b in seq[i + 1 : i + 6]:
                pair_II[a, b] += 1
                pair_II[b, a] += a != b
    score_I = np.zeros(N + 1)
    begin = data.ptr[users(data, data.train[[n]])[0]]
    for steps, old in enumerate(data.items[begin:place][::-1][:10]):
        score_I += 0.8**steps * pair_II[old] / np.sqrt(np.maximum(count_I[old] * count_I, 1))
    return score_I[1:]


def soft_by_hand(data, rows, best, T, n):
    """p_T (I,) of the training sample number n; rows: y of each teacher, the last one's counts."""
    z_TI = [(y - y.mean()) / y.std() for y in rows]
    z_TI[-1] = np.minimum(z_TI[-1], 4)
    z_I = np.mean(z_TI, 0)
    logit_I = rows[best].std() * z_I / T
    begin = data.ptr[users(data, data.train[[n]])[0]]
    p_I = np.exp(logit_I - logit_I.max())
    p_I[data.items[begin : data.train[n]] - 1] = 0
    return p_I / p_I.sum()


@pytest.mark.parametrize("most", [10, 100])
def test_the_loss_and_its_gradient_are_those_of_a_plain_loop(
    most, crowd, young, knowing, monkeypatch
):
    monkeypatch.setattr(ensemble, "MOST", most)
    monkeypatch.setattr(ensemble, "quality", lambda folder, data: folder.name == "knowing")
    a, T, which = 0.3, 2.0, np.array([3, 90, 91, 200, 77])
    found = teachers_of(crowd, [young, knowing, "co-occurrence"], kd_weight=a, kd_temp=T)
    rng = np.random.default_rng(0)
    s_NI = torch.from_numpy(rng.normal(size=(len(which), N)) * 2).requires_grad_()
    total, S = 0.0, min(most, N - 1)
    for n, s_I in zip(which, s_NI):
        rows = [scores_by_hand(crowd, folder, n) for folder in (young, knowing)]
        p_I = soft_by_hand(crowd, [*rows, counts_by_hand(crowd, young, n)], 1, T, n)
        q_I = torch.softmax(s_I / T, 0)
        top, kl = np.argsort(-p_I, kind="stable")[:S], 0.0
        for p, q in zip(p_I[top], q_I[top]):
            kl = kl + (p * (np.log(p) - q.log()) if p > 0 else 0.0)
        rest = 1 - p_I[top].sum()
        if rest > 1e-12:
            kl = kl + rest * (np.log(rest) - (1 - q_I[top].sum()).log())
        ce = -torch.log_softmax(s_I, 0)[crowd.items[crowd.train[n]] - 1]
        total = total + (1 - a) * ce + a * T**2 * kl
    (wanted,) = torch.autograd.grad(total, s_NI)
    s = s_NI.detach().float().requires_grad_()
    target_N = torch.from_numpy(crowd.items[crowd.train[which]].astype(np.int64)) - 1
    ce = torch.nn.functional.cross_entropy(s, target_N, reduction="sum")
    losses = found.losses(ce, s, crowd.train[which])
    loss = sum(losses.values())
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, s)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-3, atol=1e-5)


def test_one_teacher_at_temperature_1_says_what_it_says_by_itself(crowd, young):
    found, which = teachers_of(crowd, [young]), np.arange(0, 300, 7)
    top_NS, p_NR = found.targets(crowd.train[which])
    lists = np.load(young / "topk_train.npy")[which, :3]
    assert (top_NS[:, :3].numpy() + 1 == lists).mean() > 0.99
    for n, top_S, p_R in zip(which, top_NS.numpy(), p_NR.numpy()):
        y_I = scores_by_hand(crowd, young, n)
        old_L = histories(crowd, crowd.train[[n]], 50)[0]
        y_I[old_L[old_L > 0] - 1] = -np.inf
        p_I = np.exp(y_I - y_I.max()) / np.exp(y_I - y_I.max()).sum()
        np.testing.assert_allclose(p_R[:-1], p_I[top_S], atol=2e-3)
        assert p_R.sum() == pytest.approx(1, abs=1e-4)


def test_a_score_that_runs_away_has_a_finite_gradient(crowd, young):
    s_NI = torch.tensor([[1e4] + [0.0] * (N - 1), [0.0] * (N - 1) + [-1e4]], requires_grad=True)
    losses = teachers_of(crowd, [young]).losses(s_NI.sum() * 0, s_NI, crowd.train[:2])
    losses["kd"].backward()
    assert torch.isfinite(losses["kd"]) and torch.isfinite(s_NI.grad).all()


def test_the_best_teacher_by_validation_sets_how_sharp_it_is(crowd, young, tmp_path):
    blunt = shutil.copytree(young, tmp_path / "blunt")
    t = load_file(blunt / "folds.safetensors")
    tenth = {"item.weight": t["item.weight"] / 10, "bias": t["bias"] / 10}
    save_file(t | tenth, blunt / "folds.safetensors")
    full = np.load(blunt / "full_val.npy")
    first, second = halves_of_validation(crowd)
    full[second] = 0  # the half that no run may choose by says that it never errs
    np.save(blunt / "full_val.npy", full)
    assert ensemble.quality(blunt, crowd) == ensemble.quality(young, crowd)
    full[first] = 0
    np.save(blunt / "full_val.npy", full)
    assert ensemble.quality(blunt, crowd) == 1 > ensemble.quality(young, crowd)
    sharp, both = teachers_of(crowd, [young]), teachers_of(crowd, [young, blunt])
    _, alone = sharp.targets(crowd.train[:50])
    _, after = both.targets(crowd.train[:50])
    assert after[:, 0].mean() < alone[:, 0].mean() - 0.01


@dataclass
class Says:
    """A teacher that says what it was given."""

    y_NI: torch.Tensor
    farthest: float = ensemble.OutOfFold.farthest

    def scores(self, place_N):
        return self.y_NI


def test_counts_do_not_drown_the_other_teachers(crowd):
    """Of 4,000 items 60 were counted, one of them often; a trained model prefers another one."""
    rng, n = np.random.default_rng(0), 20
    y_NI = 2 * rng.normal(size=(n, 4000))
    count_NI, often, liked = np.zeros((n, 4000)), 3000, 3500
    count_NI[:, 2950:3010] = rng.random((n, 60)) / 10
    count_NI[:, often] = 3
    y_NI[:, often], y_NI[:, liked] = 0, 9
    trained = Says(torch.from_numpy(y_NI))
    counts = Says(torch.from_numpy(count_NI), counted.Counted.farthest)

    def targets(*teachers):
        made = ensemble.Ensemble(crowd, teachers, 0, 0.5, 1.0, np.arange(len(crowd.train)))
        return made.targets(crowd.train[:n])

    _, alone_NR = targets(trained)
    top_NS, p_NR = targets(trained, counts)
    assert p_NR[:, 0].mean() < alone_NR[:, 0].mean()
    # both are heard: what one likes, what the other counts
    assert all({often, liked} <= set(top_S) for top_S in top_NS[:, :10].tolist())


def test_a_permuted_sample_learns_what_is_said_of_another(crowd, young):
    own, other = (teachers_of(crowd, [young], kd_permute=given) for given in (False, True))
    n = len(crowd.train)
    assert sorted(other.row_n) == list(range(n))
    user_n = users(crowd, crowd.train)
    assert (user_n[other.row_n] != user_n).all()
    for found, drawn in zip(
        other.targets(crowd.train[:30]), own.targets(crowd.train[other.row_n[:30]])
    ):
        assert torch.equal(found, drawn)


def test_a_training_sample_that_a_teacher_does_not_know_is_no_target(crowd, young, tmp_path):
    few = shutil.copytree(young, tmp_path / "few")
    lists = np.load(few / "topk_train.npy")
    lists[::2] = 0
    np.save(few / "topk_train.npy", lists)
    cfg = SimpleNamespace(without_fold=None, input="ids", history=6, seed=0)
    cfg.kd = [str(young), str(few), "co-occurrence"]
    r = SimpleNamespace(data=crowd, lm=SimpleNamespace(kind="decoder"), backbone_run=young)
    assert np.array_equal(np.flatnonzero(samples_of(cfg, r, 300).is_target), crowd.train[1::2])


# ---------------------------------------------------------------- what it learns


def agreement(folder, data, chances, ranks) -> float:
    """The share of a test sample's six likeliest next items that a run has in its first ten."""
    r = open_run(load_run(folder, data), data, CPU, scores_of=history_scorer)[0]
    which = np.arange(len(data.test))
    _, _, list_nK = score_and_rank(r, "test", which, 15, ranks, np.zeros((1, N + 1), np.float32))
    shares = []
    for list_K, place in zip(list_nK, data.test):
        begin = data.ptr[users(data, np.array([place]))[0]]
        likely = np.argsort(-chances[data.items[place - 1]])[:FOLLOWERS]
        likely = set(likely) - set(data.items[begin:place])
        shares.append(len(likely & set(list_K)) / max(len(likely), 1))
    return float(np.mean(shares))


def test_an_lm_learns_chances_that_its_samples_do_not_show_and_not_from_another_s(
    tune, crowd, chances, knowing, alone, on_cpu
):
    taught = tune("taught", f"--kd {knowing} --kd-weight .9 {LEARN}")
    found = agreement(taught, crowd, chances, alone)
    plain = agreement(tune("plain", LEARN), crowd, chances, alone)
    permuted = tune("permuted", f"--kd {knowing} --kd-weight .9 --kd-permute {LEARN}")
    assert found > plain + 0.1
    assert agreement(permuted, crowd, chances, alone) < plain
    line = log_of(taught)[-1]
    assert line["kd"] > 0 and line["loss"] == pytest.approx(line["kd"] + line["candidates"])
    assert "taught by knowing (a 0.9, T 1)" in tuning_notes(load_run(taught))
    assert paper_method(load_run(taught)) is None
    assert [name_of(run.folder) for run in made_by(load_run(taught))][:2] == ["sasrec", "knowing"]
    assert "--kd knowing --kd-weight 0.9" in " ".join(command_of(load_run(taught)))


def test_with_weight_0_it_is_the_run_without_teachers(tune, knowing):
    plain, with_0 = tune("short", SHORT), tune("weight-0", f"--kd {knowing} --kd-weight 0 {SHORT}")
    for part in ("items.safetensors", "adapter/adapter_model.safetensors"):
        one, two = load_file(plain / part), load_file(with_0 / part)
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_encoder_is_taught_too(command, decoder, encoder, young, run, on_cpu, tmp_path):
    options = command(f"--kd {young} --drop-items .2 {SHORT}").replace(decoder, encoder)
    run(finetune.main, f"{options} --out {tmp_path}/run")
    assert log_of(tmp_path / "run")[-1]["kd"] > 0


# ---------------------------------------------------------------- killed, several


TAUGHT = "--kd-weight .7 --kd-temp 2 --kd-permute --ema .9 --drop-items .2"
ALL = f"--residual backbone --residual-dropout .3 {TAUGHT} {SHORT}"


def test_a_killed_run_goes_on_to_the_last_bit(
    command, young, knowing, on_cpu, tmp_path, monkeypatch
):
    options = command(f"--kd {young} --kd {knowing} --kd co-occurrence {ALL}")

    goes_on_to_the_last_bit(finetune.main, options, tmp_path, monkeypatch, after=4)


def test_two_processes_train_it_as_one_does(
    command, young, knowing, run, two_processes, on_cpu, tmp_path
):
    options = command(f"--kd {young} --kd {knowing} --kd co-occurrence {ALL} --micro 4")
    run(finetune.main, f"{options} --out {tmp_path}/one")
    two_processes([("finetune", [*options.split(), "--out", tmp_path / "two"])])
    same_run(tmp_path / "two", tmp_path / "one")


def test_a_teacher_that_lists_or_folds_otherwise_is_another_one(young, tmp_path):
    def digest(folder):
        return ensemble.digests(SimpleNamespace(kd=[str(folder), "co-occurrence"]))

    other = shutil.copytree(young, tmp_path / "other")
    assert digest(other) == digest(young)
    for name in ensemble.TELLS:
        before = (other / name).read_bytes()
        (other / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert digest(other) != digest(young)
        (other / name).write_bytes(before)


# ---------------------------------------------------------------- refusals


def test_what_cannot_be_meant_is_one_sentence(command, tune, young, refused, on_cpu, tmp_path):
    def says(options):
        return refused(finetune.main, f"{command(SHORT)} {options} --out {tmp_path}/x")

    bare = shutil.copytree(young, tmp_path / "bare")
    (bare / "states_train.npy").unlink()
    assert "lacks states_train.npy" in says(f"--kd {bare}")
    (bare / "folds.safetensors").unlink()
    text = says(f"--kd {bare}")
    assert "--kd needs a backbone that answered" in text and "train_backbone.py --folds 5" in text
    assert "--input is hybrid" in says(f"--kd {young} --input hybrid")
    assert "--drop-items empties" in says("--drop-items .1 --input hybrid")
    plain = tune("short", SHORT)
    assert "both teach this LM" in says(f"--kd {young} --teacher {plain}")
    assert "name a run of train_backbone.py" in says("--kd co-occurrence")
    for option in ("--kd-weight .1", "--kd-temp 2", "--kd-permute"):
        assert "name one, or leave" in says(option)
    assert "is no run folder" in says("--kd nothing/here")
    assert not (tmp_path / "x").exists()
