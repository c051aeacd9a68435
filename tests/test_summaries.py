"""--summary (LLM-TRSR): what a history was about before its last items, told in words."""

from copy import copy
from types import SimpleNamespace

import numpy as np
import pytest
from kinds import kind_known
from lm_cases import rank_with
from tuning import opens_as_stored

import evaluate
import finetune
from delrec.data.prepared import histories
from delrec.data.words import words_of
from delrec.lm import prompts, student, written
from delrec.lm.ragged import of_padded
from delrec.lm.samples import Validation
from delrec.lm.summaries import DECAY, SHOWN, BlockWords, OtherUsers, open_summaries
from delrec.lm.text import MASK


def test_the_words_say_what_the_last_item_does_not(fans, tuned, alone, run, on_cpu, monkeypatch):
    words = tuned("--summary words")
    assert kind_known(fans, words) > 0.75
    for control in ("--summary permuted-words", "--summary empty"):
        assert kind_known(fans, tuned(control)) < 0.62
    monkeypatch.setattr(prompts, "SHOWN", 1)
    opens_as_stored(words, fans, alone, rtol=1e-3, atol=1e-3)
    said = run(evaluate.main, f"--ckpt {words} --history Amber --top 3").json
    assert len(said["top"]) == 3
    run(evaluate.main, f"--ckpt {words} --limit 10 --val-samples 10 --out {words}/table")
    assert "summary words" in (words / "table" / "table.txt").read_text()


# ---------------------------------------------------------------- the words themselves


@pytest.mark.parametrize("later, first", [(0.7, "older"), (0.9, "newer")])
def test_an_older_block_s_word_has_faded_to_four_fifths(later, first, fans, monkeypatch):
    words = BlockWords(fans)
    blocks = {1: {0: 1.0}, 6: {1: later}}  # the heaviest words by a block's first item
    monkeypatch.setattr(words, "weights_of", lambda items: blocks[items[0]])
    told = words.of(np.arange(1, 11))
    assert sorted(told) == [0, 1] and told[0] == ["older", "newer"].index(first)


def test_a_block_s_heaviest_words_count(fans):
    words = BlockWords(fans)
    number = {text.strip(" ,"): i for i, text in enumerate(words.texts)}
    items = np.array([1, 2, 3, 4, 5, 11, 41, 12])  # a block of "user", then three further items

    def weight(word, of):
        row, col = np.nonzero(words.id_IT[of] == number[word])
        return float(words.weight_IT[of][row, col].sum())

    of_blocks = [weight("user", items[:5]), weight("oldest", items[5:])]
    told = [words.texts[i].strip(" ,") for i in words.of(items)]
    assert of_blocks[0] * DECAY > of_blocks[1] > 0
    assert told.index("user") < told.index("oldest")
    assert set(told) <= {w for i in items for w in words_of(fans.titles[i])}
    assert words.of(items) == BlockWords(fans).of(items.copy())


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder", "encoder"])
def test_a_prompt_tells_the_words_and_then_the_last_items(load, fans, kind):
    r = rank_with(load, kind, fans, summary="words")
    old = np.arange(1, 13)
    tail, at = r.prompts.history(old)
    text = r.lm.tok.decode([t for t in tail if t >= 0])
    assert text.lower().index("user") < text.lower().index("the last movies")
    shown = np.concatenate([[*r.titles.of(i), *r.lm.sep] for i in old[-SHOWN:]])
    assert tail[at].tolist() == shown.tolist()
    assert (tail == MASK).sum() == 1
    # the same history alone, among others, and with none
    beside, _ = r.prompts.histories(prompts.ragged([[], old, [41]]))
    assert beside[1].tolist() == tail.tolist()
    empty = rank_with(load, kind, fans, summary="empty")
    assert beside[0].tolist() == empty.prompts.history([])[0].tolist()
    assert len(empty.prompts.history(old)[0]) < len(tail)


def test_another_user_s_history_is_not_his_and_always_the_same(fans):
    others = OtherUsers(fans, 8)
    for sample in fans.val[:20]:
        old = fans.items[sample - 8 : sample].astype(int)
        other = others.history(old)
        assert not np.isin(old, other).all()
        assert len(other) and other.tolist() == others.history(old.copy()).tolist()


@pytest.mark.parametrize("history", [3, 5])
def test_another_user_s_history_is_as_long_as_ones_own(history, fans, load, alone, monkeypatch):
    kept = []
    monkeypatch.setattr(written.Author, "write", lambda author, old: kept.extend(old))
    cfg = SimpleNamespace(summary="permuted-recurrent", history=history, order="shuffled")
    vars(cfg).update(seed=0, samples=len(fans.train), batch=1, without_fold=())
    vars(cfg).update(C=15, val_samples=0, llm="", hint="none", pool="stored", draw="uniform")
    cfg.choose = "full"
    student.write_summaries(cfg, copy(load("decoder")), fans, "", alone)
    assert max(map(len, kept)) == history
    # and words are of the same histories
    told = open_summaries(fans, {"summary": "permuted-words", "history": history})
    block_words = BlockWords(fans)
    words = {tuple(block_words.of(items)) for items in kept}
    which = Validation(cfg, fans).which
    own = of_padded(histories(fans, fans.val[which], history))
    assert {tuple(row) for row in told.told(own)} <= words


@pytest.mark.parametrize(
    "more, said",
    [
        ("--input ids --summary words", "--summary tells of titles"),
        ("--summary permuted-words --without-fold 0", "a user that --without-fold leaves out"),
        ("--summary permuted-recurrent --without-fold 0", "a user that --without-fold leaves out"),
    ],
)
def test_what_cannot_be_meant_is_refused(more, said, fans, decoder, refused, on_cpu, tmp_path):
    asked = f"--dataset {fans.folder} --llm {decoder} {more}"
    assert said in refused(finetune.main, f"{asked} --out {tmp_path}/f")
    assert not (tmp_path / "f").exists()
