"""What evaluate.py makes once and keeps: exports, and the scores of an LM without training."""

import json
import shutil

from click.testing import CliRunner
from commands import edit_config
from run_folders import contents, names

import evaluate
from delrec import runtime
from delrec.evaluation import plain
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

    monkeypatch.setattr(plain, "calibrate", lambda *_: 0.5)
    folder = tmp_path / "runs" / "toy" / "lm"
    ask(decoder)
    before = contents(folder)
    said = ask(decoder).output
    assert "was made the same way" in said and "samples/s scored by LMs" not in said
    assert contents(folder).keys() == before.keys()
    assert contents(folder)["scores_test_15.npy"] == before["scores_test_15.npy"]
    words = load_run(folder).prompt_words
    edit_config(folder, prompt_words=words | {"noun": "tea"})
    says = ask(decoder, code=1).error
    assert "whose prompt words was" in says and "'tea'" in says
    (folder / "config.json").write_bytes(before["config.json"])
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
    # the same weight of the calibration, of fewer samples, needs no scores but those it has
    said = ask(decoder, "--val-samples", 5, "--overwrite").output
    assert load_run("toy/lm").val_samples == 5 and "samples/s scored by LMs" not in said
    assert contents(folder)["scores_test_15.npy"] == before["scores_test_15.npy"]
    ask(other, "--overwrite")
    assert load_run("toy/lm").llm == other


def test_another_calibration_ranks_the_catalogue_anew(
    toy, decoder, script, on_cpu, tmp_path, monkeypatch
):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    said = []

    def ask(name, weight, n, *args, verbalizer="mean"):
        monkeypatch.setattr(plain, "calibrate", lambda *_: weight)
        small = ["--dataset", toy.folder, "--limit", 6, "--val-samples", n]
        small += ["--verbalizer", verbalizer, "--prompt-history", 3]
        small += ["--out", tmp_path / "out", "--llm-out", f"toy/{name}"]
        said.append(script(evaluate.main, "--llm", decoder, *small, *args).output)
        return contents(tmp_path / "runs" / "toy" / name)

    ask("lm", 0.0, 6)
    made, fresh = ask("lm", 40.0, 5, "--overwrite"), ask("fresh", 40.0, 5)
    for name in ("full_test.npy", "topk_test.npy", "scores_test_15.npy", "ranks_test_15.npy"):
        assert made[name] == fresh[name], name
    assert ask("lm", 40.0, 6, "--overwrite")["full_test.npy"] == made["full_test.npy"]
    # one that reads title by title ranked no catalogue: any weight goes with its scores
    ask("by-title", 40.0, 5, verbalizer="likelihood")
    ask("by-title", 40.0, 5, "--no-calibrate", "--overwrite", verbalizer="likelihood")
    assert "samples/s scored by LMs" in said[-2] and "samples/s scored by LMs" not in said[-1]
