"""recipes/ in this process: each of their stages is the script's own main, made small."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

SMALL = {  # script -> what is added to its command line unless it is said there
    "train_backbone.py": ["--epochs", 1, "--width", 16],
    "distill.py": ["--k", 4, "--val-samples", 10, "--history", 8, "--verbalizer", "mean"],
    "finetune.py": ["--val-samples", 10, "--init-r", 4, "--target-r", 2],
    "evaluate.py": [],
    "recipes/mlp.py": ["--epochs", 1, "--hidden", 8],
}


def script_mains():
    """{script: its click command}."""
    import distill
    import evaluate
    import finetune
    import train_backbone
    from recipes import mlp

    scripts = (train_backbone, distill, finetune, evaluate, mlp)
    return {f"{script.__name__.replace('.', '/')}.py": script.main for script in scripts}


@dataclass
class Here:
    """What the stages of a recipe did in this process."""

    root: Path  # the folder of the runs
    ran: list  # the command line of each stage, script first


@pytest.fixture
def here(toy, script, on_cpu, tmp_path, monkeypatch):
    """The root of the runs is tmp_path, and stages run in this process, small."""
    from delrec import runtime
    from recipes import stage

    mains = script_mains()
    did = Here(tmp_path / "runs", [])

    def run(line, **_):
        assert line[0] == sys.executable
        args = line[2:] if line[1] == "-u" else line[4:]
        did.ran.append(args)
        script(mains[args[0]], *args[1:], *small_values(args))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    monkeypatch.setattr(stage, "run_to_its_end", run)
    return did


def small_values(args):
    """The options that make a stage small, those left out that its command line has."""
    more = SMALL[args[0]]
    if "seqsim" in args:  # is not trained
        return []
    if "ids" in args and args[0] == "distill.py":
        more = more[: more.index("--verbalizer")]  # vectors have none
    pairs = zip(more[::2], more[1::2])
    return [x for pair in pairs if pair[0] not in args for x in pair]


def run_recipe(*args):
    """What recipes/tables.py prints."""
    from recipes import tables

    done = CliRunner().invoke(tables.main, [str(a) for a in args])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def refused_recipe(*args):
    """The sentence with which recipes/tables.py ends."""
    from recipes import tables

    done = CliRunner().invoke(tables.main, [str(a) for a in args])
    assert done.exit_code == 1
    return f"{done.exception} {done.output} {done.exc_info[1]}"
