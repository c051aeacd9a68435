"""finetune.py finds planted signals: what follows what, and where the backbone lists the truth."""

import numpy as np
import pytest
from commands import metrics_of
from toys import title_of
from tuning import SMALL, opens_as_stored

import evaluate
import finetune
from delrec.runtime import load_run


@pytest.fixture(scope="module")
def markov(tmp_path_factory, make_data):
    """100 users walk 12 steps on one circle of 40 items: the next title is determined by the last
    one, and by nothing else.
    """
    rng, rows = np.random.default_rng(0), []
    circle = rng.permutation(40) + 1
    for u in range(100):
        start, times = rng.integers(40), np.sort(rng.choice(1000, 12, replace=False))
        rows += [(u, circle[(start + j) % 40], t) for j, t in enumerate(times)]
    titles = {i: title_of(i) for i in range(1, 41)}
    return make_data(tmp_path_factory.mktemp("markov"), rows, titles, "markov")


@pytest.mark.parametrize(
    "loss, verbalizer, history",
    [("candidates", "mean", 1), ("titles", "likelihood", 2), ("catalogue", "mean", 1)],
)
def test_the_lm_learns_which_title_follows_which(
    loss, verbalizer, history, markov, decoder, run, on_cpu, alone, tmp_path
):
    capable = "--adapt linear --init-r 12 --target-r 8 --alpha 32 --batch 16 --micro 16"
    args = (
        f"--dataset {markov.folder} --llm {decoder} --soft-prompt none {SMALL} {capable} "
        f"--history {history} --loss {loss} --verbalizer {verbalizer} --val-samples 80 "
        "--no-calibrate"
    )
    long = "--samples 2000 --lr 0.01 --evals 2"
    learnt = run(finetune.main, f"{args} {long} --out {tmp_path}/run")
    assert learnt.json["val_hr@1"] > 0.6, learnt.output  # chance .067
    # also where a layer kept no rank at all
    opens_as_stored(tmp_path / "run", markov, alone, rtol=1e-3, atol=1e-3)
    still = "--samples 160 --lr 1e-9 --evals 1"
    idle = run(finetune.main, f"{args} {still} --out {tmp_path}/idle")
    assert idle.json["val_hr@1"] < 0.25


@pytest.fixture(scope="module")
def oracle(toy, make_backbone, tmp_path_factory):
    """A backbone that knows the truth: in its order the right candidate always stands first."""

    def score(samples):
        s = np.random.default_rng(0).random((len(samples), toy.n_items + 1))
        s[np.arange(len(samples)), toy.items[samples]] = 10
        return s

    return make_backbone(tmp_path_factory.mktemp("oracle") / "sasrec", toy, score)


def test_the_lm_learns_where_the_backbone_lists_the_truth(
    toy, to_tune, oracle, run, on_cpu, alone, tmp_path
):
    first = tmp_path / "first"
    args = (
        f"{to_tune} --soft-prompt none --backbone {oracle} --history 2 --adapt linear --batch 16 "
        "--micro 16 --loss candidates --verbalizer letter --val-samples 60 --samples 480 "
        "--no-calibrate"
    )
    learnt = run(finetune.main, f"{args} --order backbone --out {first}")
    assert learnt.json["val_hr@1"] > 0.9  # always the letter A
    opens_as_stored(first, toy, alone, rtol=1e-3, atol=1e-3)
    assert load_run(first).backbone_run == str(oracle)
    anywhere = run(finetune.main, f"{args} --order shuffled --out {tmp_path}/anywhere")
    assert anywhere.json["val_hr@1"] < 0.3
    # the table ranks the stored candidates, whatever order the prompt listed them in
    run(evaluate.main, f"--ckpt {first} --candidates 15 --limit 20 --val-samples 20")
    rows = metrics_of(first / "evaluation")["rows"]
    assert rows["first"]["hr@1"] > 0.9
    assert rows["sasrec"]["hr@1"] == 1
    assert "backbone order" in rows["first"]["note"]
