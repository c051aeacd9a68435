"""--summary recurrent (LLM-TRSR): summaries that the LM writes, block after block, once, and each
when it is first asked for.
"""

import re
import shutil
import threading
import zlib
from collections import Counter
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kinds import KINDS, kind_known, owner
from scripts import sentence
from tuning import SMALL, opens_as_stored

import evaluate
import finetune
from delrec.data.floors import places_for_fusion
from delrec.data.prepared import histories, load_data
from delrec.evaluation.scores import places_in_test
from delrec.lm import prompts, samples, student, written
from delrec.lm.model import load_lm
from delrec.lm.ragged import of_padded, ragged
from delrec.lm.ranker import open_run
from delrec.lm.summaries import open_summaries
from delrec.lm.written import Author, keys_of, name_of
from delrec.runtime import load_run

pytest_plugins = ["lm_fixtures"]


def texts_in(data):
    """{key: summary} of the one file beside some data; no key stands in it twice."""
    [path] = data.folder.glob("summaries-*.jsonl")
    pairs = list(written.pairs_in(path.read_bytes()))
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


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
    fans, tuned, alone, script, on_cpu, monkeypatch
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
    # of a new history they are written when it is asked, once
    monkeypatch.setattr(written, "continued", said_kind)
    asked = "--ckpt", told, "--history", "user user 3 | Amber | user user 7 | Iron", "--top", 3
    best = script(evaluate.main, *asked).json["top"]
    assert all(x["title"].startswith("user user") for x in best)
    monkeypatch.setattr(written, "continued", never)
    assert script(evaluate.main, *asked).json["top"] == best


def last_title(lm, asked, ranks):
    """A writer that tells the last title of what it is asked about."""
    texts = [lm.tok.decode(tokens, skip_special_tokens=True) for tokens in asked]
    return [re.findall(r"Film \d+", text)[-1] for text in texts]


def test_the_control_s_summary_is_another_user_s_whatever_is_written_later(
    shelves, load, alone, monkeypatch
):
    monkeypatch.setattr(written, "continued", last_title)
    m = copy(load("decoder"))
    cfg = SimpleNamespace(summary="permuted-recurrent", order="shuffled", choose="full")
    vars(cfg).update(history=8, seed=0, samples=len(shelves.train), batch=1, without_fold=())
    vars(cfg).update(C=15, val_samples=0, llm="", hint="none", pool="stored", draw="uniform")
    student.write_summaries(cfg, m, shelves, "", alone)
    places = np.concatenate([shelves.train, shelves.val, shelves.test])
    old = of_padded(histories(shelves, places, 8))

    def told():
        own = open_summaries(shelves, vars(cfg), m.author)
        texts = [own.texts[n] for n in own.told(old).flat]
        return [shelves.titles.index(text.strip()) for text in texts]

    first = told()
    owners = [owner(shelves, [item]) for item in first]
    assert all(a != owner(shelves, items) for a, items in zip(owners, old))
    every = [shelves.items[i : i + n] for i in range(40) for n in (1, 2, 3)]
    assert m.author.write(ragged(every))
    assert told() == first


# ---------------------------------------------------------------- each once, when it is asked for


@pytest.fixture
def author(fans, load, alone, tmp_path):
    """author() -> one who writes into an empty folder, and knows nothing yet."""
    m, data = load("decoder"), replace(fans, folder=tmp_path / "kept")
    data.folder.mkdir()
    return lambda: Author(m, data, name_of(m, data), "", alone)


@pytest.fixture
def numbered(monkeypatch):
    """The texts that a writer was asked about; it answers with their places among them."""
    asked = []

    def write(lm, tokens, ranks):
        first = len(asked)
        asked.extend(lm.tok.decode(row, skip_special_tokens=True) for row in tokens)
        return [f"number {n}" for n in range(first, len(asked))]

    monkeypatch.setattr(written, "continued", write)
    return asked


def test_each_block_is_written_once_behind_the_one_before(author, numbered, monkeypatch):
    monkeypatch.setattr(written, "KEPT", 2)
    me, old = author(), np.arange(1, 13)
    data, own = me.data, partial(keys_of, me.data)
    assert me.write(ragged([old, old[:5], old[:7], []])) == 4
    assert len(numbered) == 4  # 5 of 12, 10, 12; and 7, which shares its first block
    texts, keys = texts_in(data), own(old)
    assert keys[:1] == own(old[:5]) and len(set(keys)) == 3
    for n, key in enumerate(keys[1:], 1):
        [said] = [x for x in numbered if texts[key] == f"number {numbered.index(x)}"]
        assert f"What is known of the user: {texts[keys[n - 1]]}" in said
        titles = [data.titles[i] for i in old[5 * n : 5 * n + 5]]
        assert "; ".join(titles) in said and data.titles[1] not in said
    # another process writes what is missing alone
    assert author().write(ragged([old, old[:7], old[:6]])) == 1 and len(numbered) == 5
    assert texts_in(data) == texts | {own(old[:6])[-1]: "number 4"}
    # which the first one then knows, though it read the file before
    assert me.write(ragged([old[:6]])) == 0 and me.of(old[:6]) == "number 4"


def test_an_added_item_is_told_by_its_title_whatever_its_number_was_elsewhere(author, numbered):
    me, items = author(), np.array([1, 50])
    shops = [
        replace(me, data=replace(me.data, titles=[*me.data.titles, title]), texts={})
        for title in ("Mirror", "Needle", "Mirror")
    ]
    assert [shop.write([items]) for shop in shops] == [1, 1, 0]
    assert [shop.of(items) for shop in shops] == ["number 0", "number 1", "number 0"]
    assert "Mirror" in numbered[0] and "Needle" in numbered[1]


def test_a_killed_writing_goes_on(author, numbered, monkeypatch):
    monkeypatch.setattr(written, "KEPT", 3)
    old, write = ragged([np.array([i, i + 1]) for i in range(1, 9)]), written.continued

    def dies(lm, tokens, ranks):
        if len(numbered) == 6:
            raise KeyboardInterrupt
        return write(lm, tokens, ranks)

    monkeypatch.setattr(written, "continued", dies)
    me = author()
    with pytest.raises(KeyboardInterrupt):
        me.write(old)
    before = texts_in(me.data)
    assert len(before) == 6
    with open(me.path, "a") as file:
        file.write('["half a li')  # killed in a line
    monkeypatch.setattr(written, "continued", write)
    again = author()
    assert again.write(old) == 2 and len(numbered) == 8
    after = texts_in(me.data)
    assert len(after) == 8 and before.items() <= after.items()
    assert author().write(old) == 0


def test_two_who_write_at_once_write_each_once(author, numbered, monkeypatch):
    monkeypatch.setattr(written, "KEPT", 1)
    old, both = ragged([np.array([i, i + 1]) for i in range(1, 20)]), [author(), author()]
    threads = [threading.Thread(target=one.write, args=(old,)) for one in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(numbered) == len(texts_in(both[0].data)) == 19
    assert [both[0].of(items) for items in old] == [both[1].of(items) for items in old]


def test_where_nothing_can_be_written_they_are_for_the_command_alone(
    author, numbered, monkeypatch, capsys
):
    def closed(path):
        raise PermissionError(path)

    old = ragged([np.array([1, 2]), np.array([3])])
    first = old.take(np.array([0]))
    author().write(first)
    monkeypatch.setattr(written, "alone_with", closed)
    me = author()
    assert me.write(first) == 0  # it may be read all the same
    assert "note" not in capsys.readouterr().out
    assert me.write(old) == 1 and me.write(old) == 0 and me.write([np.array([4])]) == 1
    assert [me.of(items) for items in old] == ["number 0", "number 1"]
    assert capsys.readouterr().out.count("note: summaries are not kept") == 1
    assert len(texts_in(me.data)) == 1


def keys_at(data, places):
    """The keys of all blocks of the histories before some places in data.items."""
    return {key for items in of_padded(histories(data, places, 25)) for key in keys_of(data, items)}


@pytest.fixture
def small(fans, decoder, run, on_cpu, tmp_path):
    """small(options) -> (its data, the run) of a short training with data and an LM of its own."""

    def tune(options=""):
        old = shutil.ignore_patterns("summaries-*")
        folder = shutil.copytree(fans.folder, tmp_path / "fans", ignore=old)
        llm = shutil.copytree(decoder, tmp_path / "llm")
        args = f"--dataset {folder} --llm {llm} --soft-prompt none {SMALL} --history 25"
        args += " --summary recurrent --verbalizer mean --no-calibrate"
        run(finetune.main, f"{args} {options} --out {tmp_path}/run")
        return load_data(folder), load_run(tmp_path / "run")

    return tune


def test_a_run_writes_what_it_asks_and_a_table_the_rest(small, run, monkeypatch, tmp_path):
    asked = []

    def by_prompt(lm, tokens, ranks):
        asked.extend(zlib.crc32(row.tobytes()) % 1000 for row in tokens)
        return [f"number {n}" for n in asked[len(asked) - len(tokens) :]]

    monkeypatch.setattr(written, "continued", by_prompt)
    data, told = small()
    seen = samples.Histories(told, data, "", 48).places
    own = [seen, data.val[samples.Validation(told, data).which]]
    known = keys_at(data, np.concatenate(own))
    assert texts_in(data).keys() == known and len(asked) == len(known)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    table = "--limit 20 --val-samples 10"
    run(evaluate.main, f"--ckpt {tmp_path}/run {table}")
    places = data.test[places_in_test(data, 20, 0)], data.val[places_for_fusion(data, 10)]
    assert keys_at(data, np.concatenate(places)) - known
    known |= keys_at(data, np.concatenate(places))
    assert texts_in(data).keys() == known and len(asked) == len(known)
    assert known < keys_at(data, np.concatenate([data.train, data.val, data.test]))
    # what was written bit by bit is what is written at once
    [path] = data.folder.glob("summaries-*.jsonl")
    path.unlink()
    lm = open_run(load_run(tmp_path / "other"), data, torch.device("cpu"))[0].lm
    lm.author.write(of_padded(histories(data, np.concatenate([data.val, data.test]), 25)))
    monkeypatch.setattr(written, "continued", never)
    run(evaluate.main, f"--ckpt {tmp_path}/other {table}")
    for name in ("scores_test_15.npy", "scores_val_15.npy", "full_test.npy"):
        both = [np.load(tmp_path / folder / name) for folder in ("run", "other")]
        np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-5)


def test_what_is_written_later_is_the_lm_s_own_not_its_adapter_s(small, alone):
    data, told = small()
    r, _ = open_run(told, data, torch.device("cpu"))
    old, me = [data.items[i : i + 5] for i in range(0, 60, 5)], r.lm.author
    assert me.write(old)
    lm = load_lm(told.llm, torch.device("cpu"))
    [levels] = written.chapters_of(data, old, {})
    prompts = [written.tokens_asked(lm, data, levels[key], {}) for key in sorted(levels)]
    assert written.continued(lm, prompts, alone) == [me.texts[key] for key in sorted(levels)]
    assert written.continued(r.lm, prompts, alone) != [me.texts[key] for key in sorted(levels)]


def test_a_whole_trained_lm_s_summaries_are_of_the_one_it_began_with(
    small, run, refused, monkeypatch
):
    by, write = [], written.continued

    def noted(lm, *rest):
        by.append(lm.identity)
        return write(lm, *rest)

    monkeypatch.setattr(written, "continued", noted)
    _, told = small("--adapt all --lr 0.001")
    trained = len(by)
    run(evaluate.main, f"--ckpt {told.folder} --limit 10 --val-samples 10")
    assert len(by) > trained and set(by) == {by[0]} != {told.llm_fingerprint}
    more = f"--ckpt {told.folder} --limit 40 --val-samples 40"
    with monkeypatch.context() as patch:
        patch.setattr(written, "ASKED", written.ASKED.replace("likes", "loves"))
        assert "or delrec/lm/written.py asks it in other words" in refused(evaluate.main, more)
    Path(told.llm_from).rename(Path(told.llm_from).with_name("gone"))
    says = refused(evaluate.main, more)
    assert f"summaries are written by {told.llm_from}" in says and "cannot be had" in says


def test_two_processes_write_each_once(small, two_processes):
    data, told = small()
    before = texts_in(data)
    two_processes([("evaluate", ["--ckpt", told.folder, "--limit", 40, "--val-samples", 10])])
    places = data.test[places_in_test(data, 40, 0)], data.val[places_for_fusion(data, 10)]
    after = texts_in(data)
    assert after.keys() == before.keys() | keys_at(data, np.concatenate(places))
    assert before.items() < after.items()


# ---------------------------------------------------------------- what an LM writes


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


def test_an_encoder_writes_nothing_and_says_so(load):
    says = sentence(written.must_write, load("encoder"))
    assert "is an encoder LM, which writes nothing; use finetune.py --summary words" in says
