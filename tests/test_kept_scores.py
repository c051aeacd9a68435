"""What evaluate.py makes once and keeps: exports, and the scores of an LM without training."""

import json
import shutil

from click.testing import CliRunner
from run_folders import contents, names

import evaluate
from delrec import runtime
from delrec.lm import export
from delrec.runtime import load_run, read_json


def test_a_complete_export_is_replaced_only_when_asked_and_only_by_a_complete_one(
    chain, script, on_cpu, tmp_path, monkeypatch
):
    run = shutil.copytree(chain.delrec, tmp_path / "delrec")
    config = json.loads((run / "config.json").read_text()) | {"C": 8}
    (run / "config.json").write_text(json.dumps(config))

    def ask(*args, code=0):
        return script(evaluate.main, "--ckpt", run, "--export", "--limit", 6, *args, code=code)

    ask("--export-k", 5)
    before = contents(run / "export")
    assert "is complete" in ask("--export-k", 5).output
    says = ask("--export-k", 4, code=1).error
    assert "whose K was 5, now it is 4" in says
    assert "--overwrite" in says
    assert contents(run / "export") == before
    with monkeypatch.context() as patch:
        patch.setattr(export, "title_vectors", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        CliRunner().invoke(
            evaluate.main,
            ["--ckpt", str(run), "--export", "--limit", "6", "--export-k", "4", "--overwrite"],
        )
    assert contents(run / "export") == before and (run / "export.unfinished").is_dir()
    assert "continuing after 6" in ask("--export-k", 4, "--overwrite").output
    assert read_json(run / "export" / "meta.json")["K"] == 4
    assert not (run / "export.unfinished").exists()


def test_the_plain_lm_is_used_again_and_another_one_is_refused(
    toy, backbone, decoder, script, on_cpu, tmp_path, monkeypatch
):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    copy, other = shutil.copytree(decoder, tmp_path / "copy"), f"random:{decoder}"
    small = ["--dataset", toy.folder, "--ckpt", backbone, "--out", tmp_path / "out"]
    small += ["--verbalizer", "mean", "--prompt-history", "3", "--limit", "6", "--val-samples", "6"]

    def ask(llm, *args, code=0):
        return script(evaluate.main, "--llm", llm, *small, *args, code=code)

    folder = tmp_path / "runs" / "toy" / "lm"
    ask(decoder)
    before = contents(folder)
    said = ask(decoder).output
    assert "was made the same way" in said and "samples/s scored by LMs" not in said
    assert contents(folder).keys() == before.keys()
    assert contents(folder)["scores_test_15.npy"] == before["scores_test_15.npy"]
    said = ask(copy).output  # the same LM in another place
    assert "was made the same way" in said and "samples/s scored by LMs" not in said
    for more in ([], ["--val-samples", 5]):
        says = ask(other, *more, code=1).error
        assert "whose llm was" in says and "--overwrite" in says and "--llm-out" in says
    says = ask(decoder, "--val-samples", 5, code=1).error
    assert "whose val samples was 6, now it is 5" in says and "and keeps its scores" in says
    assert contents(folder)["config.json"] == before["config.json"]
    assert names(folder.parent) == ["lm"]
    ask(other, "--llm-out", "toy/other-lm")
    assert load_run("toy/other-lm").llm == other and load_run("toy/lm").llm == decoder
    # another weight of the calibration needs no scores but those it has
    said = ask(decoder, "--val-samples", 5, "--overwrite").output
    assert load_run("toy/lm").val_samples == 5 and "samples/s scored by LMs" not in said
    assert contents(folder)["scores_test_15.npy"] == before["scores_test_15.npy"]
    ask(other, "--overwrite")
    assert load_run("toy/lm").llm == other
