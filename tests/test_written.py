"""--summary recurrent (LLM-TRSR): summaries that the LM writes, block after block, once."""

import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kinds import KINDS, kind_known, owner
from scripts import sentence
from test_summaries import opens_as_stored

import evaluate
from delrec.data.prepared import histories
from delrec.lm import prompts, student, written
from delrec.lm.ragged import of_padded, ragged
from delrec.lm.summaries import Kept, open_summaries
from delrec.runtime import read_json

pytest_plugins = ["lm_fixtures"]


def said_kind(lm, asked, ranks):
    """A writer that tells the kind whose word stands doubled most often, as it does in titles, and
    in what was written before.
    """
    texts = [lm.tok.decode(tokens, skip_special_tokens=True) for tokens in asked]
    counts = [Counter(re.findall(r"\b([a-z]+) \1\b", text)) for text in texts]
    kinds = [count.most_common(1)[0][0] if count else "" for count in counts]
    assert set(kinds) <= {*KINDS, ""}
    return [f"{kind} {kind}" for kind in kinds]


def never(*_):
    raise AssertionError("it was written before")


def test_what_the_lm_wrote_of_a_history_says_what_the_last_item_does_not(
    fans, tuned, alone, refused, on_cpu, monkeypatch
):
    monkeypatch.setattr(written, "continued", said_kind)
    told = tuned("--summary recurrent")
    assert kind_known(fans, told) > 0.75
    # the stored ones are read again; ten stand in a file for people
    monkeypatch.setattr(written, "continued", never)
    monkeypatch.setattr(prompts, "SHOWN", 1)
    opens_as_stored(told, fans, alone, rtol=1e-3, atol=1e-3)
    [page] = fans.folder.glob("summaries-*.txt")
    lines = page.read_text().splitlines()
    assert sum(line.startswith("=> ") for line in lines) == 10
    says = refused(evaluate.main, f"--ckpt {told} --history Amber")
    assert "nobody wrote one of a new history" in says
    kept = Kept(fans, page.stem.removeprefix("summaries-"))
    assert "nobody wrote a summary" in sentence(kept.of, np.array([7, 7]))
    path = page.with_suffix(".json")
    path.rename(path.with_suffix(".gone"))
    assert "is not there, and with it the summaries" in refused(evaluate.main, f"--ckpt {told}")
    path.with_suffix(".gone").rename(path)


def last_title(lm, asked, ranks):
    """A writer that tells the last title of what it is asked about."""
    texts = [lm.tok.decode(tokens, skip_special_tokens=True) for tokens in asked]
    return [re.findall(r"Film \d+", text)[-1] for text in texts]


def test_the_control_s_summary_is_another_user_s_whatever_is_written_later(
    shelves, load, alone, monkeypatch
):
    monkeypatch.setattr(written, "continued", last_title)
    m, cfg = load("decoder"), SimpleNamespace(summary="permuted-recurrent", order="shuffled")
    vars(cfg).update(history=8, seed=0, samples=len(shelves.train), batch=1, without_fold=())
    student.write_summaries(cfg, m, shelves, "", alone)
    places = np.concatenate([shelves.train, shelves.val, shelves.test])
    old = of_padded(histories(shelves, places, 8))

    def told():
        own = open_summaries(shelves, vars(cfg))
        texts = [own.texts[n] for n in own.told(old).flat]
        return [shelves.titles.index(text.strip()) for text in texts]

    first = told()
    owners = [owner(shelves, [item]) for item in first]
    assert all(a != owner(shelves, items) for a, items in zip(owners, old))
    every = [shelves.items[i : i + n] for i in range(40) for n in (1, 2, 3)]
    assert written.write_missing(m, shelves, ragged(every), alone) == cfg.summaries
    assert told() == first


def test_each_block_is_written_once_behind_the_one_before(fans, load, alone, monkeypatch):
    asked = []

    def numbered(lm, tokens, ranks):
        texts = [lm.tok.decode(row, skip_special_tokens=True) for row in tokens]
        first = len(asked)
        asked.extend(texts)
        return [f"number {first + i}" for i in range(len(texts))]

    monkeypatch.setattr(written, "continued", numbered)
    monkeypatch.setattr(written, "KEPT", 2)
    monkeypatch.setattr(written, "file_of", lambda data, name: fans.folder / "numbered.json")
    m, old = load("decoder"), np.arange(1, 13)
    written.write_missing(m, fans, ragged([old, old[:5], old[:7], []]), alone)
    assert len(asked) == 4  # 5 of 12, 10, 12; and 7, which shares its first block
    texts = read_json(fans.folder / "numbered.json")
    keys = written.keys_of(old)
    assert keys[:1] == written.keys_of(old[:5]) and len(set(keys)) == 3
    for n, key in enumerate(keys[1:], 1):
        [said] = [x for x in asked if texts[key] == f"number {asked.index(x)}"]
        assert f"What is known of the user: {texts[keys[n - 1]]}" in said
        own = [fans.titles[i] for i in old[5 * n : 5 * n + 5]]
        assert "; ".join(own) in said and fans.titles[1] not in said
    written.write_missing(m, fans, ragged([old, old[:7], old[:6]]), alone)
    assert len(asked) == 5
    assert read_json(fans.folder / "numbered.json") == texts | {
        written.keys_of(old[:6])[-1]: "number 4"
    }


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_it_writes_what_plain_transformers_write(kind, load, plain, alone, monkeypatch):
    m, rng = load(kind), np.random.default_rng(0)
    asked = [np.array([*m.start, *rng.integers(20, 60, n), *m.end]) for n in (3, 17, 9)]
    found = written.greedy(m, asked, 6)
    for tokens, row in zip(asked, found):
        ids = torch.from_numpy(tokens)[None]
        out = plain(kind).generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0].tolist()
        new = out[len(tokens) :] if kind == "decoder" else out[1:]
        ends = [i for i, t in enumerate(new) if t == plain(kind).generation_config.eos_token_id]
        assert row[row >= 0].tolist() == new[: ends[0] if ends else 6]
    # the LM is read as before
    text = written.continued(m, asked, alone, most=6)
    assert len(text) == 3 and text == written.continued(m, asked, alone, most=6)
    head = m.model.get_output_embeddings()
    x = torch.randn(2, 32)
    assert torch.equal(head(x), x) == (kind != "decoder")


def test_an_encoder_writes_nothing_and_says_so(fans, load, alone):
    says = sentence(written.write_missing, load("encoder"), fans, ragged([[1]]), alone)
    assert "is an encoder LM, which writes nothing; use --summary words" in says
