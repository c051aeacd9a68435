"""What takes half a minute each and stands beside tests of `make test`: LMs of other kinds divided
among processes, and the end of all processes when one dies."""

import time

import pytest
import torch
from chain import stages
from commands import prompt_of, same_run
from stopped_runs import dying, kept_in

import distill
import finetune
from delrec.training import checkpoints


@pytest.mark.parametrize("kind", ["encoder_decoder", "encoder"])
def test_an_lm_of_another_kind_is_divided_too(
    kind, toy, backbone, request, two_processes, script, on_cpu, tmp_path
):
    to_prompt, to_delrec = stages(
        toy,
        backbone,
        request.getfixturevalue(kind),
        tmp_path / "one" / "prompt",
        tmp_path / "one" / "delrec",
    )
    to_delrec[to_delrec.index("--loss") + 1] = "candidates"
    script(distill.main, *to_prompt)
    script(finetune.main, *to_delrec)
    there = (
        [
            str(a).replace(str(tmp_path / "one" / "prompt"), str(tmp_path / "two"))
            for a in to_prompt
        ],
        [
            str(a).replace(str(tmp_path / "one" / "delrec"), str(tmp_path / "delrec"))
            for a in to_delrec
        ],
    )
    two_processes([("distill", [*there[0], "--shard"]), ("finetune", [*there[1], "--shard"])])
    torch.testing.assert_close(
        prompt_of(tmp_path / "two"), prompt_of(tmp_path / "one" / "prompt"), rtol=1e-5, atol=1e-5
    )
    same_run(tmp_path / "delrec", tmp_path / "one" / "delrec")


def test_a_process_that_dies_ends_the_others(jobs, tmp_path):
    began = time.time()
    done = dying(jobs, tmp_path, restarts=0)
    assert done.returncode != 0 and time.time() - began < 200, done.said
    assert "local_rank: 1" in done.said and "SIGKILL" in done.said
    assert checkpoints.complete(kept_in(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()
