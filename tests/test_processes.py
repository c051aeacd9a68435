"""Several processes give what one gives: an LM divided among them, three of them, test parts of any
size.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from chain import evaluation, stages
from commands import log_of, prompt_of, same_run
from safetensors.torch import load_file
from toys import title_of

import distill
import evaluate
import finetune


@pytest.mark.long
def test_three_processes_with_a_part_of_the_lm_each_give_what_one_with_all_of_it_gives(
    chain, toy, backbone, decoder, two_processes, script, on_cpu, tmp_path
):
    to_prompt, _ = stages(toy, backbone, decoder, tmp_path / "prompt", "")
    _, to_delrec = stages(toy, backbone, decoder, chain.prompt, tmp_path / "delrec")
    for name in ("one", "three"):
        copy = shutil.copytree(chain.delrec, tmp_path / name)
        for path in copy.glob("*_test_*"):
            path.unlink()
    script(evaluate.main, *evaluation(tmp_path / "one"))
    said = two_processes(
        [
            ("distill", [*to_prompt, "--shard"]),
            ("finetune", [*to_delrec, "--shard", "--gradient-checkpointing"]),
            ("evaluate", [*evaluation(tmp_path / "three"), "--shard"]),
        ],
        3,
    )
    torch.testing.assert_close(
        prompt_of(tmp_path / "prompt"), prompt_of(chain.prompt), rtol=1e-5, atol=1e-5
    )
    for a, b in zip(log_of(chain.prompt), log_of(tmp_path / "prompt")):
        assert [b["loss_ta"], b["loss_rps"]] == pytest.approx(
            [a["loss_ta"], a["loss_rps"]], rel=1e-4
        )
    same_run(tmp_path / "delrec", chain.delrec)
    np.testing.assert_allclose(
        np.load(tmp_path / "three" / "scores_test_15.npy"),
        np.load(tmp_path / "one" / "scores_test_15.npy"),
        rtol=1e-5,
        atol=1e-4,
    )
    here, whole = (
        int(x.replace(",", ""))
        for x in re.search(
            r"among 3 processes: ([\d,]+) of ([\d,]+) parameters on this one", said
        ).groups()
    )
    weights = load_file(f"{decoder}/model.safetensors")
    # the first process' rows
    in_layers = {
        k: -(-len(t) // 3) * (t.numel() // len(t)) for k, t in weights.items() if ".layers." in k
    }
    assert len(in_layers) > 8 and here == sum(in_layers.values()) + sum(
        t.numel() for k, t in weights.items() if k not in in_layers
    )
    assert whole == sum(t.numel() for t in weights.values())


def test_one_process_has_nothing_to_divide(toy, backbone, decoder, script, on_cpu, tmp_path):
    to_prompt, _ = stages(toy, backbone, decoder, tmp_path / "prompt", "")
    assert (
        "torchrun --nproc_per_node" in script(distill.main, *to_prompt, "--shard", code=1).error
        and not (tmp_path / "prompt").exists()
    )


@pytest.fixture(scope="module")
def wide(make_data, tmp_path_factory):
    """Data with 96 or more test samples."""
    rng = np.random.default_rng(1)
    rows = [
        (u, i + 1, int(t))
        for u in range(110)
        for i, t in zip(
            rng.choice(60, 10, replace=False), np.sort(rng.choice(1000, 10, replace=False))
        )
    ]
    return make_data(
        tmp_path_factory.mktemp("wide"), rows, {i: title_of(i) for i in range(1, 61)}, "wide"
    )


RECORD = """
import numpy
from delrec.lm import ranker as ranking
gather = ranking.gather_rows
def recording(rows, index, n, ranks):
    numpy.save("{folder}/" + "-".join(map(str, [n, ranks.world, ranks.rank])), index)
    return gather(rows, index, n, ranks)
ranking.gather_rows = recording
"""


def test_every_sample_counts_once_however_many_processes_and_samples(
    wide, make_backbone, decoder, two_processes, script, on_cpu, tmp_path
):
    from toys import popular

    backbone = make_backbone(tmp_path / "sasrec", wide, popular(wide))
    _, to_delrec = stages(wide, backbone, decoder, "none", tmp_path / "run")
    script(finetune.main, *to_delrec, "--backbone", backbone)
    assert len(wide.test) >= 95
    jobs = {world: [] for world in (1, 3)}  # two: see the other tests
    for world in jobs:
        for n in (5, 95):
            copy = shutil.copytree(tmp_path / "run", tmp_path / f"{n}-{world}")
            jobs[world].append(("evaluate", ["--ckpt", copy, "--limit", n, "--val-samples", 30]))
    for _, args in jobs[1]:
        script(evaluate.main, *args)
    two_processes(jobs[3], 3, RECORD.format(folder=tmp_path))
    for n in (5, 95):
        one = json.loads((tmp_path / f"{n}-1" / "evaluation" / "metrics.json").read_text())["rows"]
        seen = np.concatenate([np.load(tmp_path / f"{n}-3-{rank}.npy") for rank in range(3)])
        assert sorted(seen) == list(range(n))
        other = json.loads(
            (tmp_path / f"{n}-3" / "evaluation" / "metrics.json")
            .read_text()
            .replace(f"{n}-3", f"{n}-1")
        )["rows"]
        assert other == one and len(one) >= 5
        assert np.array_equal(
            np.load(tmp_path / f"{n}-3" / "scores_test_15.npy"),
            np.load(tmp_path / f"{n}-1" / "scores_test_15.npy"),
            equal_nan=True,
        )
