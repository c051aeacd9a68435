"""distill.py and finetune.py on the toy data and the tiny decoder: arguments, and finished runs."""

import shutil
from types import SimpleNamespace

import pytest

# every option that matters is said, so that no other default moves what the tests expect
COMMON = (
    "--verbalizer likelihood --no-show --no-instruct --history 6 --max-title 32 --max-tokens 1024 "
    "--batch 8 --micro 4 --seed 0 --evals 2"
)
STAGE_1 = (
    "--k 6 --tasks both --a 3 --h 5 --candidates 8 --balance gradnorm --samples 48 --lr 0.05 "
    "--weight-decay 1e-5 --warmup 0.1 --val-samples 20 --rps-candidates random --loss candidates"
)
STAGE_2 = (
    "--order shuffled --adapt qv --init-r 6 --target-r 3 --alpha 32 --dropout 0 --orthogonal 0.1 "
    "--prune-end 0.7 "
    "--loss both --candidates 15 --samples 80 --lr 0.03 --weight-decay 1e-6 --warmup 0.1 "
    "--val-samples 30 --calibrate"
)


def stages(data, backbone, llm, prompt, out):
    """Arguments of distill.py and of finetune.py: they write `prompt` and `out`."""
    common = ["--dataset", data.folder, "--llm", llm, *COMMON.split()]
    return (
        ["--backbone", backbone, "--out", prompt, *common, *STAGE_1.split()],
        ["--soft-prompt", prompt, "--out", out, *common, *STAGE_2.split()],
    )


def evaluation(run):
    """Arguments of evaluate.py for a run of these stages."""
    return ["--ckpt", run, "--candidates", 15, "--val-samples", 30, "--limit", 40]


@pytest.fixture(scope="session")
def chain(toy, backbone, decoder, script, fp32, tmp_path_factory):
    """distill.py and finetune.py run once on the toy data by one process: their folders and click's
    results. Nobody may write there.
    """
    import distill
    import finetune

    folder = tmp_path_factory.mktemp("chain")
    to_prompt, to_delrec = stages(toy, backbone, decoder, folder / "prompt", folder / "delrec")
    with fp32():
        return SimpleNamespace(
            prompt=folder / "prompt",
            delrec=folder / "delrec",
            distilled=script(distill.main, *to_prompt),
            tuned=script(finetune.main, *to_delrec),
        )


@pytest.fixture(scope="session")
def twins(chain, toy, backbone, decoder, two_processes, tmp_path_factory):
    """The same by two processes: .prompt, .delrec (from the one process's prompt), and .evaluated,
    a copy of the one process's delrec whose test part two processes scored.
    """
    folder = tmp_path_factory.mktemp("twins")
    to_prompt, _ = stages(toy, backbone, decoder, folder / "prompt", "")
    _, to_delrec = stages(toy, backbone, decoder, chain.prompt, folder / "delrec")
    copy = shutil.copytree(chain.delrec, folder / "evaluated")
    for path in copy.glob("*_test_*"):
        path.unlink()
    printed = two_processes(
        [("distill", to_prompt), ("finetune", to_delrec), ("evaluate", evaluation(copy))]
    )
    return SimpleNamespace(
        prompt=folder / "prompt", delrec=folder / "delrec", evaluated=copy, printed=printed
    )
