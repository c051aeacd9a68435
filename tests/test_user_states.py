"""distill.py --user-states: items that carry the backbone's state of the history up to them."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import edit_config, log_of, metrics_of
from safetensors.torch import save_file
from vector_runs import DISTIL, ranker_settings

import distill
import finetune
from delrec.data.prepared import histories, users
from delrec.evaluation.paper import paper_method
from delrec.evaluation.rows import note_of
from delrec.lm import items, user_states
from delrec.lm.ragged import of_padded
from delrec.lm.ranker import (
    make_ranker,
    open_run,
    over_catalogue,
    score_samples,
)
from delrec.lm.reading import read_examples, read_prefix
from delrec.lm.residual import histories_of
from delrec.lm.text import ITEM
from delrec.lm.user_states import STRIDE
from delrec.lm.windows import Windows, targets_of
from delrec.runtime import load_run

CPU = torch.device("cpu")
TASTES, LIKED, OTHERS = 4, 5, 24  # tastes; items of each; items that say nothing
N = TASTES * LIKED + OTHERS
LEARN = (
    "--tasks rps --h 5 --samples 1280 --batch 16 --micro 16 --lr 0.02 --lr-maps 0.01 --evals 1 "
    "--val-samples 0 --history 2"
)


def taste_of(item) -> int:
    """Which taste an item is of, TASTES for none."""
    return min((item - 1) // LIKED, TASTES)


class Taste:
    """A backbone that recommends what is of the taste of the first item, however long ago."""

    history = 10

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        self.e_IE = torch.randn(N + 1, 8, generator=draw)
        for item in range(1, TASTES * LIKED + 1):
            self.e_IE[item] += 6 * torch.eye(8)[taste_of(item)]
        self.b_I = torch.randn(N + 1, generator=draw)

    def states(self, olds):
        none_1E = torch.zeros(1, 8)
        return torch.cat([torch.eye(8)[:TASTES], none_1E])[[taste_of(old[0]) for old in olds]]

    def scores(self, olds):
        y_BI = self.states(olds) @ self.e_IE.T + self.b_I
        y_BI[:, 0] = -torch.inf
        return y_BI

    def on(self, device):
        return self


def folder_of_states(folder, rule, data, K=3):
    """Makes of a backbone's run folder one that answered out of fold, by a rule."""
    save_file({"item.weight": rule.e_IE, "bias": rule.b_I}, folder / "model.safetensors")
    folds = {"item.weight": rule.e_IE.repeat(K, 1, 1), "bias": rule.b_I.repeat(K, 1)}
    fold_U = torch.arange(data.n_users) % K
    save_file(folds | {"fold": fold_U}, folder / "folds.safetensors")
    olds = [old[old > 0] for old in histories(data, data.train, 10)]
    np.save(folder / "states_train.npy", rule.states(olds).numpy().astype(np.float16))
    return edit_config(folder, folds=K)


@pytest.fixture(scope="module")
def tastes(make_data, tmp_path_factory):
    """80 users who begin with an item of their taste, and go on with others of none."""
    rng, rows = np.random.default_rng(0), []
    for user in range(80):
        first = user % TASTES * LIKED + 1 + int(rng.integers(LIKED))
        others = TASTES * LIKED + 1 + rng.choice(OTHERS, 7, replace=False)
        rows += [(user, int(i), 10 * t) for t, i in enumerate([first, *others])]
    titles = {i: f"Film {i}" for i in range(1, N + 1)}
    rows += [(f"once {i}", i, 0) for i in range(1, N + 1)]
    return make_data(tmp_path_factory.mktemp("tastes"), rows, titles, "tastes")


@pytest.fixture(scope="module")
def taste(tastes, make_backbone, tmp_path_factory):
    """The rule's run folder."""
    rule = Taste()

    def score(samples):
        olds = [old[old > 0] for old in histories(tastes, samples, 10)]
        return rule.scores(olds).numpy()

    folder = make_backbone(tmp_path_factory.mktemp("rule") / "taste", tastes, score)
    return folder_of_states(folder, rule, tastes)


@pytest.fixture
def by_taste(monkeypatch, on_cpu):
    """Both stages ask the rule, for which there is no model to load."""
    for stage in (distill, finetune):
        monkeypatch.setattr(stage, "history_scorer", lambda run: Taste())


@pytest.fixture(scope="module")
def command(tastes, taste, decoder):
    """Options of either stage, without --out."""
    return f"--dataset {tastes.folder} --backbone {taste} --llm {decoder}"


@pytest.fixture(scope="module")
def learnt(command, run, fp32, tmp_path_factory):
    """learnt(options) -> the run of distill.py on the rule's lists, made once."""
    home, made = tmp_path_factory.mktemp("prompts"), {}

    def get(options):
        if options not in made:
            made[options] = home / f"run{len(made)}"
            with fp32(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(distill, "history_scorer", lambda run: Taste())
                where = f"{command} --out {made[options]}"
                run(distill.main, f"{where} {DISTIL} {LEARN} {options}")
        return made[options]

    return get


@pytest.fixture
def right(tastes, alone, on_cpu):
    """right(run) -> how often an LM that is shown two items of no taste scores those of its user's
    taste highest, on test; chance is 1 / 4."""
    old_nL = histories(tastes, tastes.test, 10)
    first_n = np.array([old[old > 0][0] for old in old_nL])
    asked = (old_nL[:, -2:] > TASTES * LIKED).all(1)

    def of(folder):
        r = opened(folder, tastes)
        tails, _ = r.prompts.histories(of_padded(old_nL[:, -2:]))
        olds = histories_of(r.lm, tastes, tastes.test, mixed=False)
        s_nI = over_catalogue(r, tails, N + 1, lambda j, s_BI: s_BI, alone, None, olds)
        liked_nT = s_nI[:, 1 : TASTES * LIKED + 1].reshape(-1, TASTES, LIKED).mean(2)
        right_n = liked_nT.argmax(1) == [taste_of(i) for i in first_n]
        return right_n[asked].mean()

    return of


def opened(folder, data):
    """A run as a ranker that asks the rule."""
    return open_run(load_run(folder, data), data, CPU, scores_of=lambda run: Taste())[0]


# ---------------------------------------------------------------- what it learns


def test_what_only_the_state_tells_is_learnt_from_it_and_not_from_another_s(learnt, right):
    assert right(learnt("--user-states backbone")) > 0.9
    assert right(learnt("--user-states permuted")) < 0.5
    assert right(learnt("")) < 0.5


def test_it_begins_as_the_same_run_without_states_to_the_last_bit(learnt, tastes, alone, on_cpu):
    with_states, without = learnt("--user-states backbone"), learnt("")
    assert metrics_of(with_states)["before"] == metrics_of(without)["before"]
    first, plain = log_of(with_states)[0], log_of(without)[0]
    assert first["loss_rps"] == plain["loss_rps"]
    assert log_of(with_states)[9]["loss_rps"] != log_of(without)[9]["loss_rps"]
    r, which = opened(with_states, tastes), np.arange(len(tastes.test))
    torch.nn.init.zeros_(r.lm.items.maps["user"].weight)
    carried = score_samples(r, "test", which, 15, alone)
    r.lm.items.users = None
    assert np.array_equal(score_samples(r, "test", which, 15, alone), carried)


def test_tables_say_whose_states_are_carried(learnt):
    own, other = (learnt(f"--user-states {whose}") for whose in ("backbone", "permuted"))
    assert "items carry its user's state" in note_of(load_run(own))
    assert "items carry somebody else's state" in note_of(load_run(other))
    assert paper_method(load_run(own)) is None


# ---------------------------------------------------------------- what each read is told


@pytest.fixture
def reading(load, tastes, taste):
    """reading(whose) -> the tiny decoder as a ranker whose items carry states by a drawn map."""
    lm = load("decoder")

    def of(whose="backbone", place=taste):
        items.load_items(lm, place, N)
        cfg = SimpleNamespace(user_states=whose, history=6, seed=0)
        user_states.add_states(lm, cfg, tastes, place, lambda run: Taste())
        torch.nn.init.normal_(lm.items.maps["user"].weight)
        return make_ranker(lm, tastes, ranker_settings())

    try:
        yield of
    finally:
        lm.items = None


def of_training(r, data) -> tuple[list, np.ndarray]:
    """Windows as prompts, and what the LM says at each of their reads."""
    batch = Windows(data, 6, 12, 0).prompts(r, np.arange(12))
    with torch.no_grad():
        x_ND = read_examples(r.lm, read_prefix(r.lm, r.prompts.prefix), batch)
    return batch, x_ND.numpy()


def test_each_read_is_told_the_state_of_its_own_sample_and_none_of_a_later_one(reading, tastes):
    r = reading()
    batch, x_ND = of_training(r, tastes)
    place_N = targets_of(batch, "place")
    for window in batch:  # its reads: at the last item, and then those before it
        carried = (ITEM - window.tail[window.tail <= ITEM]) // STRIDE
        assert carried[-1] == window.place[0] and set(window.place) <= set(carried.tolist())
    states, first = r.lm.items.users.asked.states, batch[0]
    told_nE, own_N = states.x_nE, np.isin(place_N, first.place)
    assert len(first.place) > 3
    for place in first.place:
        states.x_nE = told_nE.copy()
        states.x_nE[np.searchsorted(tastes.train, place)] += 1
        changed_N = np.abs(of_training(r, tastes)[1] - x_ND).max(1) > 1e-6
        assert changed_N[place_N == place].all()
        assert not changed_N[own_N & (place_N < place)].any()


def test_in_training_another_s_state_is_of_another_user_of_the_fold(reading, tastes):
    r = reading("permuted")
    row_n, user_n = r.lm.items.users.asked.states.row_n, users(tastes, tastes.train)
    fold_n = r.lm.items.folds.fold_U[user_n]
    assert (user_n[row_n] != user_n).all() and np.array_equal(fold_n[row_n], fold_n)


def test_an_item_whose_sample_was_not_answered_carries_nothing(reading, tastes, taste, tmp_path):
    few = shutil.copytree(taste, tmp_path / "few")
    lists = np.load(few / "topk_train.npy")
    lists[::2] = 0
    np.save(few / "topk_train.npy", lists)
    r = reading(place=few)
    for window in of_training(r, tastes)[0]:
        place = window.place[0] + 1 - np.arange(1, (window.tail <= ITEM).sum() + 1)[::-1]
        known = np.isin(place, tastes.train[1::2])
        carried = (ITEM - window.tail[window.tail <= ITEM]) // STRIDE
        assert np.array_equal(carried, np.where(known, place, 0)) and known.any()


def test_at_scoring_each_item_carries_the_full_model_s_state_after_it(reading, tastes):
    r = reading()
    old_nL = histories(tastes, tastes.test[:5], 10)
    olds, shown = [old[old > 0] for old in old_nL], of_padded(old_nL[:, -4:])
    tails, _ = r.prompts.histories(shown)
    nbar, sd = r.lm.items.users.scale_2
    with user_states.told(r.lm, tails, olds) as carrying:
        id_M = ITEM - carrying.flat[carrying.flat <= ITEM]
        u_ME = r.lm.items.users.u(id_M // STRIDE, id_M % STRIDE // (N + 1))
    begun = [old[: len(old) - 3 + n] for old in olds for n in range(4)]
    want = Taste().states(begun)
    torch.testing.assert_close(u_ME[:, :-1], nbar * want)
    assert (u_ME[:, -1] == sd).all() and want.any(1).all()
    assert np.array_equal(id_M % STRIDE, shown.flat)
    with (
        pytest.raises(ValueError, match="are not the last ones"),
        user_states.told(r.lm, tails, [old[:-1] for old in olds]),
    ):
        pass
