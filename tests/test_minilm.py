"""minilm.py: a title's vector by all-MiniLM-L6-v2, here a tiny random BERT, read once and kept."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train_backbone
from delrec.data import fetch
from delrec.lm import minilm
from delrec.runtime import load_run
from delrec.serving.card_text import licences


def test_a_title_s_vector_is_the_mean_state_of_its_pieces(encoder, alone):
    from transformers import AutoTokenizer, BertForMaskedLM

    titles = ["", "Silver River", "The Crimson Machine of the North (1994)", "x", ""]
    Z = minilm.encoded(encoder, titles, alone)
    tok, model = AutoTokenizer.from_pretrained(encoder), BertForMaskedLM.from_pretrained(encoder)
    for title, z in zip(titles[1:], Z[1:]):
        with torch.no_grad():
            out = model(**tok(title, return_tensors="pt"), output_hidden_states=True)
        mean = out.hidden_states[-1][0].mean(0)
        np.testing.assert_allclose(z, mean / mean.norm(), atol=1e-5)
    assert not Z[0].any()
    long = minilm.encoded(encoder, ["", "river " * 400, "river " * 254], alone)
    np.testing.assert_allclose(long[1], long[2], atol=1e-5)


def test_minilm_reads_the_titles_once(toy, encoder, run, on_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(minilm, "fetch_minilm", lambda: Path(encoder))
    monkeypatch.setattr(fetch, "CACHE", tmp_path / "cache")
    folder = shutil.copytree(toy.folder, tmp_path / "toy")
    where = f"--dataset {folder} --epochs 1 --width 16 --text tfidf+minilm"
    said = run(train_backbone.main, f"{where} --out {tmp_path}/first").output
    [kept] = folder.glob("minilm-*.npy")
    Z = np.load(kept)
    assert Z.shape == (61, 32) and Z.dtype == np.float32 and "tfidf+minilm" in said
    monkeypatch.setattr(minilm, "encoded", lambda *_: pytest.fail("it is there already"))
    run(train_backbone.main, f"{where} --out {tmp_path}/second")
    first, second = (tmp_path / n / "model.safetensors" for n in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert any("MiniLM" in line for line in licences(load_run(tmp_path / "first"), toy))
    # other titles are other vectors
    assert minilm.digest_of(Path(encoder), toy.titles) in kept.name
    assert minilm.digest_of(Path(encoder), toy.titles[:-1] + ["z"]) not in kept.name
