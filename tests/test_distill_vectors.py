"""distill.py --input ids: a soft prompt and maps learn the backbone's lists after every item."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from commands import metrics_of
from lm_cases import pattern, temporal_analysis
from safetensors.torch import load_file, save_file
from vector_runs import DISTIL, ranker_settings

import distill
import evaluate
from delrec.data.prepared import users
from delrec.lm import items, windows
from delrec.lm.model import load_lm
from delrec.lm.ranker import make_ranker, open_run
from delrec.lm.text import ITEM, random_soft_prompt
from delrec.runtime import load_run
from delrec.training import checkpoints

LEFT = ("soft_prompt.safetensors", "items.safetensors")


def permutations_of(n, h) -> torch.Tensor:
    """The first h of the items 1..n in five orders."""
    seeds = [torch.Generator().manual_seed(i) for i in range(5)]
    return torch.stack([torch.randperm(n, generator=seed)[:h] + 1 for seed in seeds])


def plackett_luce(row, listed):
    """Minus the mean log probability of drawing the listed items one after another."""
    left, terms = list(range(len(row))), []
    for item in (listed - 1).tolist():  # draw one, put it aside, draw the next
        terms.append(row[left].logsumexp(0) - row[item])
        left.remove(item)
    return torch.stack(terms).mean()


def test_the_list_s_loss_is_plackett_luce():
    s = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ranked = permutations_of(12, 4)
    want = torch.stack([plackett_luce(row, listed) for row, listed in zip(s, ranked)])
    torch.testing.assert_close(distill.listwise(s, ranked), want)
    first = F.cross_entropy(s, ranked[:, 0] - 1, reduction="none")
    torch.testing.assert_close(distill.listwise(s, ranked[:, :1]), first)
    # a list of the whole catalogue
    assert torch.isfinite(distill.listwise(s, permutations_of(12, 12))).all()
    best = s.argsort(1, descending=True)[:, :4] + 1
    assert (distill.listwise(s, best) < distill.listwise(s, best.flip(1))).all()


def test_a_prompt_of_vectors_tells_nothing_of_the_list_and_hides_the_item_that_is_asked(
    with_items, toy
):
    r = make_ranker(with_items, toy, ranker_settings(history=8))
    window = np.array([3, 9, 14, 27, 31, 40, 52])

    def shown(tail):
        return (ITEM - tail[tail <= ITEM]).tolist()

    assert shown(pattern(r, window, np.array([1, 2, 5]))) == window.tolist()
    # i_1..i_{a-2}; i_a, i_{a-1}; i_a..i_{n-2}; i_n: and i_{n-1} = 40 is asked
    assert shown(temporal_analysis(r, window, 4)) == [3, 9, 27, 14, 27, 31, 52]


# ---------------------------------------------------------------- it learns


def test_prompt_and_maps_learn_the_backbone_s_list_of_a_frozen_lm(
    distilled, toy, decoder, sasrec, on_cpu
):
    result = metrics_of(distilled)
    # chance .1
    assert result["before"]["rps"] < 0.3
    assert result["after"]["rps"] > 0.6
    r, _ = open_run(load_run(distilled, toy, ["distill"]), toy, torch.device("cpu"))
    fresh = load_lm(decoder, torch.device("cpu"))
    # the LM itself did not move
    assert all(torch.equal(p, q) for p, q in zip(r.lm.model.parameters(), fresh.model.parameters()))
    assert not torch.equal(r.P, random_soft_prompt(fresh, 4, 0))
    items.load_items(fresh, sasrec, 60)
    # nor did the backbone's vectors
    assert torch.equal(fresh.items.E, r.lm.items.E)


def test_without_learning_rates_nothing_is_learnt(to_vectors, run, on_cpu, tmp_path):
    still = "--tasks rps --samples 40 --lr 1e-20 --lr-maps 1e-20"
    run(distill.main, f"{to_vectors} --out {tmp_path}/still {still}")
    result = metrics_of(tmp_path / "still")
    assert result["after"]["rps"] == pytest.approx(result["before"]["rps"], abs=0.01)


def test_each_read_is_taught_the_list_of_its_own_place(
    toy, to_vectors, run, on_cpu, tmp_path, monkeypatch
):
    listwise, prompts_of = distill.listwise, windows.Windows.prompts
    taught, batches = [], []

    def listwise_seen(s_NI, ranked_Nh):
        taught.append(ranked_Nh)
        return listwise(s_NI, ranked_Nh)

    def prompts_seen(*args):
        batches.append(prompts_of(*args))
        return batches[-1]

    monkeypatch.setattr(distill, "listwise", listwise_seen)
    monkeypatch.setattr(windows.Windows, "prompts", prompts_seen)
    run(distill.main, f"{to_vectors} --out {tmp_path}/p --samples 16 --micro 8 --evals 1")

    def next_free(place):
        """The next number after the last item that the user has not had."""
        last = int(toy.items[place - 1])
        old = toy.items[toy.ptr[users(toy, np.array([place]))[0]] : place].tolist()
        numbers = (n % toy.n_items + 1 for n in range(last, last + 60))
        return next(n for n in numbers if n not in old)

    for batch, ranked in zip(batches, taught):
        places = windows.targets_of(batch, "place")
        assert ranked[:, 0].tolist() == [next_free(place) for place in places]
    assert len(taught) == 2


def test_a_prompt_of_vectors_ranks_the_catalogue_without_stage_2(
    distilled, next_number, run, on_cpu, tmp_path
):
    out = tmp_path / "table"
    run(evaluate.main, f"--ckpt {next_number} {distilled} --out {out} --val-samples 20")
    assert distilled.name in metrics_of(out)["full"]
    mine, theirs = (np.load(folder / "scores_test_15.npy") for folder in (distilled, next_number))
    assert np.isfinite(mine).all()
    # among 15 others too it often chooses as the backbone does; chance .07
    assert (mine.argmax(1) == theirs.argmax(1)).mean() > 0.3


# ---------------------------------------------------------------- what a run promises


def test_one_process_and_two_distil_the_same(to_vectors, run, on_cpu, two_processes, tmp_path):
    args = f"{to_vectors} --samples 32 --evals 1 --lr 0.01 --out {tmp_path}"
    run(distill.main, f"{args}/one")
    two_processes([("distill", f"{args}/two".split())])
    for name in LEFT:
        one, two = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-5)


@pytest.fixture
def killed(to_vectors, on_cpu, tmp_path):
    """distill.py's options of a run that was killed after its third step, tmp_path/cut."""
    args = f"{to_vectors} --samples 48 --evals 2 --lr 0.01 --checkpoint-every 1"
    save = checkpoints.Saver.save

    def save_and_die(self, step, *rest):
        save(self, step, *rest)
        if step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.Saver, "save", save_and_die)
        CliRunner().invoke(distill.main, f"{args} --out {tmp_path}/cut".split())
    assert not (tmp_path / "cut" / "config.json").exists()
    torch.manual_seed(99)  # a new process knows nothing of the old one
    return args


def test_a_killed_stage_1_goes_on_exactly(killed, run, tmp_path):
    run(distill.main, f"{killed} --out {tmp_path}/whole")
    run(distill.main, f"{killed} --micro auto --out {tmp_path}/auto")
    assert load_run(tmp_path / "auto").micro >= 1
    run(distill.main, f"{killed} --out {tmp_path}/cut --resume")
    for name in LEFT:
        whole, cut = load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)
        assert all(torch.equal(whole[key], cut[key]) for key in whole), name


def turn_lists(path):
    np.save(path, np.load(path)[:, ::-1])


def stretch_vectors(path):
    weights = load_file(path)
    longer = weights["item.weight"] * torch.linspace(1, 2, 61)[:, None]
    save_file(weights | {"item.weight": longer}, path)


@pytest.mark.parametrize(
    "name, train_again, says",
    [
        ("model.safetensors", stretch_vectors, "item-vectors was"),
        ("topk_train.npy", turn_lists, "backbone-lists was"),
    ],
)
def test_a_killed_stage_1_does_not_go_on_with_a_backbone_trained_again_in_its_place(
    name, train_again, says, killed, next_number, refused, tmp_path
):
    kept = (next_number / name).read_bytes()
    try:
        train_again(next_number / name)
        assert says in refused(distill.main, f"{killed} --out {tmp_path}/cut --resume")
    finally:
        (next_number / name).write_bytes(kept)


# ---------------------------------------------------------------- refusals


def test_what_cannot_be_is_refused(
    toy, next_number, backbone, decoder, encoder, refused, on_cpu, tmp_path
):
    def says(options):
        where = f"--dataset {toy.folder} --out {tmp_path}/p {DISTIL}"
        return refused(distill.main, f"{where} {options}")

    assert "needs a decoder-only LM" in says(f"--backbone {next_number} --llm {encoder}")
    without_vectors = says(f"--backbone {backbone} --llm {decoder}")
    assert "there is no" in without_vectors
    assert "train_backbone.py" in without_vectors
    assert not (tmp_path / "p").exists()
    partly = shutil.copytree(next_number, tmp_path / "partly")
    lists = np.load(partly / "topk_train.npy")
    lists[::2] = 0
    np.save(partly / "topk_train.npy", lists)
    n = len(lists)
    few = (
        f"lists {n // 2} of {n} training samples: train it again with train_backbone.py --lists {n}"
    )
    assert few in says(f"--backbone {partly} --llm {decoder}")
