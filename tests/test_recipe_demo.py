"""recipes/demo.py: its stages, which are only recorded here."""

import shutil

from click.testing import CliRunner
from recipe_runs import script_mains

from delrec import runtime
from recipes import demo


def test_the_demo_replaces_its_own_runs_only_and_says_so(toy, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    mains = script_mains()
    seen = []

    class Stage:
        def __init__(self, line, **_):
            seen.append(line[2:])
            self.stdout = ['{"rows": []}\n']
            if line[2] in mains and line[2] != "distill.py":  # every flag exists
                mains[line[2]].make_context(line[2], list(line[3:]))
                assert "--overwrite" in line

        def wait(self):
            return 0

    monkeypatch.setattr(demo.subprocess, "Popen", Stage)
    said = CliRunner().invoke(demo.main, [], catch_exceptions=False).output
    assert len(seen) == 6 and "is replaced" not in said
    outs = [
        line[line.index(flag) + 1]
        for line in seen
        for flag in ("--out", "--llm-out")
        if flag in line
    ]
    assert outs == [f"ml-100k/demo/{name}" for name in ("sasrec", "prompt", "delrec", "lm")]
    shutil.copytree(backbone, tmp_path / "runs" / "ml-100k" / "demo" / "sasrec")
    said = CliRunner().invoke(demo.main, [], catch_exceptions=False).output
    assert said.count("is replaced once the new one is") == 1 and "demo/sasrec, finished 20" in said
