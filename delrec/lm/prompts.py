"""The prompts as token arrays: prefix + tail.

The prefix (instruction + soft prompt) is the same for all samples of a task, so a decoder-only LM
computes its keys and values once (reading.py). A tail holds what a sample shows and asks. Slots of
the soft prompt, the mask and items' vectors are negative numbers (text.py): no title can spell
them.

Prompts are formed many at a time. All that they can say, a title or a few fixed words, is a piece:
a row of one table of tokens. A prompt is a row of numbers of pieces, so forming prompts means to
put such numbers side by side and to look the tokens up, once for all of them (ragged.py).
"""

import copy
import shlex
from functools import partial

import numpy as np

from delrec.data.prepared import Data
from delrec.lm.model import LM
from delrec.lm.ragged import Ragged, below, beside, of_matrix, pointers, ragged, same, spans
from delrec.lm.summaries import SHOWN, open_summaries
from delrec.lm.text import ITEM, MASK, SLOT, encode, must_have_vectors
from delrec.lm.titles import Titles
from delrec.lm.wording import (
    ABOUT,
    INSTRUCTIONS,
    WORDS,
    lists_candidates,
    pattern_of,
    wording_of,
)
from delrec.runtime import Run, stop

# the flags that shape a prompt, and what they are where a run has no such flag
DEFAULTS = {
    "input": "titles",
    "verbalizer": "likelihood",
    "show": False,
    "order": "shuffled",
    "instruct": False,
    "history": 10,
    "max_title": 32,
    "max_tokens": 1024,
    "summary": None,
    "permute_vectors": False,
    "hint": "none",
    "orders": 1,
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def settings_of_run(run: Run) -> dict:
    """A run's settings, with all that shapes its prompts; the defaults of a backbone's, which has
    none."""
    return DEFAULTS | getattr(run, "settings", {})


def must_have_words(run: Run, data: Data) -> None:
    """Stops if prompts say other words now than those that the run was trained with: their fixed
    ones, or the data's. Runs of earlier versions do not say theirs."""
    settings = settings_of_run(run)
    wording = settings.get("wording")
    if wording and wording != wording_of(settings):
        stop(
            f"{run.folder} was trained on prompts with other fixed words than "
            "delrec/lm/wording.py has now; bring those back, or train the run again"
        )
    words, now = getattr(run, "prompt_words", None), data.meta["words"]
    if not words or words == now:
        return
    flags = " ".join(f"--{key} {shlex.quote(words[key])}" for key in ("noun", "verb"))
    stop(
        f"{run.folder} was trained on prompts of {words['noun']!r} and {words['verb']!r}, the data "
        f"in {data.folder} now say {now['noun']!r} and {now['verb']!r}; prepare them again with "
        f"{flags} (with --overwrite, or to another --out that --dataset names), or train the run "
        "again"
    )


class Pieces:
    """All that prompts can say, each a row of tokens: the title of every item and the separator
    behind it, at the item's own number; every item as a history shows it; some texts by name."""

    def __init__(self, titles: Titles, sep: np.ndarray, shown: str, texts: dict[str, np.ndarray]):
        """shown: titles, ids or hybrid (see Prompts)."""
        n = len(titles.ptr) - 1
        title, behind = Ragged(titles.tok, titles.ptr), same(sep, n)
        vector = of_matrix(ITEM - np.arange(n)[:, None])
        parts = [beside(title, behind)]
        self.first_shown = 0 if shown == "titles" else n
        if shown == "ids":
            parts.append(vector)
        if shown == "hybrid":
            parts.append(beside(title, vector, behind))
        first_text = n + self.first_shown
        self.number = {name: first_text + i for i, name in enumerate(texts)}
        self.tokens = below(*parts, ragged(list(texts.values())))
        self.first_added = len(self.tokens)

    @property
    def added(self) -> int:
        """How many texts were added."""
        return len(self.tokens) - self.first_added

    def add(self, texts: list[np.ndarray]) -> None:
        """More texts, behind all others."""
        if texts:
            self.tokens = below(self.tokens, ragged(texts))

    def named(self, name: str, n: int) -> Ragged:
        """The number of a text, once in each of n rows."""
        return same([self.number[name]], n)

    def shown(self, items: Ragged) -> Ragged:
        """The numbers of items as histories show them."""
        return Ragged(items.flat + self.first_shown, items.ptr)

    def spelled(self, said: Ragged) -> Ragged:
        """The tokens of rows of pieces' numbers."""
        tokens = self.tokens.take(said.flat)
        return Ragged(tokens.flat, tokens.ptr[said.ptr])

    def count(self, said: Ragged) -> np.ndarray:
        """How many tokens all pieces in front of each take, and all together: (M + 1,)."""
        return pointers(self.tokens.ptr[said.flat + 1] - self.tokens.ptr[said.flat])

    def sizes(self, said: Ragged) -> np.ndarray:
        """How many tokens each row takes (n,)."""
        return np.diff(self.count(said)[said.ptr])


class Prompts:
    """The prefix of a task, and the tails of the three prompts.

    Tails come as (tokens, at): row b of `at` holds the places of the history's tokens in row b of
    tokens. Where a prompt is too long, the oldest history goes first.
    """

    def __init__(
        self, lm: LM, data: Data, titles: Titles, settings: dict, k: int = 0, shown: str = "titles"
    ):
        """settings: a run's, with all of DEFAULTS. k: slots of the soft prompt; 0 leaves it out and
        the words about it. shown: a history item is its title, its vector (ids: E4SRec), or both
        (hybrid: LLaRA, arXiv 2312.02445)."""
        self.lm, self.titles, self.shown = lm, titles, shown
        self.noun, self.verb = data.meta["words"]["noun"], data.meta["words"]["verb"]
        self.backbone = settings["backbone"]
        self.letters = settings["verbalizer"] == "letter"
        self.lists = lists_candidates(settings)
        self.lists_vectors = shown == "hybrid"  # listed candidates carry their vectors too (LLaRA)
        self.sep = np.asarray(lm.sep)
        # room for the title that a forced pass appends, or for its masks
        self.longest = int(np.diff(titles.ptr).max()) + len(self.sep)
        self.budget = min(settings["max_tokens"] or lm.max_tokens, lm.max_tokens)
        pattern = self.pattern_told(k, settings.get("words", False))
        self.summaries = open_summaries(data, settings, lm.author)
        about = ABOUT["history" if self.summaries is None else "summary"]
        about = self.text(self.filled(about))
        self.prefixes = {}
        for task, words in INSTRUCTIONS.items():
            asked = [self.text(self.filled(words))] if settings["instruct"] else []
            parts = [np.asarray(lm.start, np.int64), *asked, *pattern, about]
            self.prefixes[task] = np.concatenate(parts)
        # the last token of the prefix begins every tail, so that the first title's first token has
        # a state that predicts it
        self.prefix = self.prefixes["history"][:-1]
        self.pieces = Pieces(titles, self.sep, shown, self.texts(about[-1:]))

    def asking(self, task: str) -> "Prompts":
        """The same prompts behind the instruction of a task: history, ta or rps."""
        other = copy.copy(self)
        other.prefix = self.prefixes[task][:-1]
        return other

    def history(
        self, items: np.ndarray | list[int], cand: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, at) of one prompt of stage 2."""
        cand_1C = None if cand is None else np.asarray(cand)[None]
        tails, at = self.histories(ragged([items]), cand_1C)
        return tails[0], at[0]

    def histories(
        self, old: Ragged, cand_nC: np.ndarray | None = None, hint_nh: np.ndarray | None = None
    ) -> tuple[Ragged, Ragged]:
        """(tokens, at) of stage 2: what comes after these items? (DELRec, section IV-C) hint_nh:
        what the backbone would choose, best first (RecRanker, arXiv 2312.16018)."""
        hint = []
        if hint_nh is not None:
            hint = [self.pieces.named("hint", len(old)), of_matrix(hint_nh)]
        rest = hint + self.listed(cand_nC)
        if rest:
            rest.append(self.pieces.named("next", len(old)))
        if self.summaries is None:
            return self.tails(old, rest)
        return self.tails(old.cut(-SHOWN), rest, self.summarised(old))

    def temporal_analyses(
        self, old: Ragged, a: int, cand_nC: np.ndarray | None = None
    ) -> tuple[Ragged, Ragged]:
        """(tokens, at) of stage 1, TA (DELRec, section IV-B): items i_1..i_n; the example solves
        i_{a-1} from i_a, the question asks i_{n-1} given i_n."""
        said, shown = partial(self.pieces.named, n=len(old)), self.pieces.shown(old)
        example = [
            said("next was"),
            shown.cut(a - 1, a),
            said("most recent was"),
            shown.cut(a - 2, a - 1),
            said("later"),
        ]
        question = [
            said("next was"),
            shown.cut(-1),
            *self.listed(cand_nC),
            said("most recent was"),
        ]
        # the example's history goes first, whole, then the question's
        room_n = self.room(beside(said("begin"), *example, *question, said("mask")))
        before, after = old.cut(0, a - 2), shown.cut(a - 1, -2)
        later = self.latest(after, room_n)
        whole_n = later.lengths == after.lengths
        before = before.keep(np.repeat(whole_n, before.lengths))
        return self.tails(before, [*example, later, *question])

    def patterns(
        self, old: Ragged, ranked_nh: np.ndarray, cand_nC: np.ndarray | None = None
    ) -> tuple[Ragged, Ragged]:
        """(tokens, at) of stage 1, RPS (DELRec, section IV-B): the backbone ranked r_1..r_h after
        these items; told are r_2..r_h, asked is r_1. Of vectors the whole list is asked, so none of
        it is told."""
        if self.shown == "ids":
            return self.histories(old)
        told = [
            self.pieces.named("choices", len(old)),
            of_matrix(ranked_nh[:, 1:]),
            *self.listed(cand_nC),
            self.pieces.named("first choice", len(old)),
        ]
        return self.tails(old, told)

    # ------------------------------------------------ the pieces

    def filled(self, words: str) -> str:
        """Some words with the names of these data and of the backbone in them."""
        n, N = self.noun, self.noun.capitalize()
        return words.format(n=n, N=N, v=self.verb, b=self.backbone)

    def text(self, words: str) -> np.ndarray:
        """The tokens of some words and the separator."""
        tokens = np.asarray(encode(self.lm, words) + list(self.lm.sep), np.int64)
        must_have_vectors(self.lm, tokens)
        return tokens

    def texts(self, begin: np.ndarray) -> dict[str, np.ndarray]:
        """The tokens of all fixed words, by name. begin: what every tail begins with."""
        texts = {"begin": begin, "mask": np.array([MASK])}
        for name, words in WORDS.items():
            texts[name] = self.text(self.filled(words))
        for letter in LETTERS if self.letters else "":
            texts[letter] = np.asarray(encode(self.lm, f"{letter}. "), np.int64)
        if self.summaries is not None:
            texts["latest"] = np.concatenate([self.sep, texts["latest"]])
        return texts

    def pattern_told(self, k: int, in_words: bool) -> list[np.ndarray]:
        """What stands for the backbone in the prefix: k slots, its pattern in words, or nothing."""
        about = self.filled(ABOUT["backbone"])
        if k:
            return [np.asarray(encode(self.lm, about), np.int64), np.full(k, SLOT), self.sep]
        if in_words:
            return [self.text(f"{about} {self.filled(pattern_of(self.backbone))}")]
        return []

    def listed(self, cand_nC: np.ndarray | None) -> list[Ragged]:
        """The candidates, with letters where they are asked for; nothing where none are listed."""
        if cand_nC is None or not self.lists:
            return []
        if self.lists_vectors:
            cand_nC = cand_nC + self.pieces.first_shown
        if self.letters:
            cand_nC = cand_nC[:, : len(LETTERS)]
            mark_C = [self.pieces.number[letter] for letter in LETTERS[: cand_nC.shape[1]]]
            marks_nC = np.broadcast_to(mark_C, cand_nC.shape)
            cand_nC = np.stack([marks_nC, cand_nC], 2).reshape(len(cand_nC), -1)
        return [self.pieces.named("candidates", len(cand_nC)), of_matrix(cand_nC)]

    def summarised(self, old: Ragged) -> Ragged:
        """The summaries of histories (LLM-TRSR), and the words that announce the last items."""
        told, pieces = self.summaries.told(old), self.pieces
        new = self.summaries.texts[pieces.added :]  # an LM may have written them just now
        pieces.add([np.asarray(encode(self.lm, text), np.int64) for text in new])
        told = Ragged(told.flat + pieces.first_added, told.ptr)
        return beside(told, pieces.named("latest", len(old)))

    def tails(
        self, old: Ragged, rest: list[Ragged], ahead: Ragged | None = None
    ) -> tuple[Ragged, Ragged]:
        """The tails and their `at`. old: history items, of which the first may be dropped; ahead of
        them and, as rest, behind them: numbers of the pieces that must stay."""
        begin, mask = (self.pieces.named(name, len(old)) for name in ("begin", "mask"))
        begin = begin if ahead is None else beside(begin, ahead)
        rest = beside(*rest, mask)
        begin_n, rest_n = (self.pieces.sizes(said) for said in (begin, rest))
        told = self.latest(self.pieces.shown(old), self.room(beside(begin, rest)))
        tokens = self.pieces.spelled(beside(begin, told, rest))
        told_n = tokens.lengths - begin_n - rest_n
        return tokens, Ragged(spans(begin_n, told_n), pointers(told_n))

    def room(self, stays: Ragged) -> np.ndarray:
        """How many tokens each history may take (n,) beside the pieces that must stay; stops where
        these alone are too many."""
        around = len(self.prefix) + len(self.lm.end) + self.longest
        needed_n = around + self.pieces.sizes(stays)
        if (needed_n > self.budget).any():
            can_rise = self.budget < self.lm.max_tokens
            raised = ", which distill.py and finetune.py --max-tokens raise" if can_rise else ""
            stop(
                f"a prompt needs {needed_n[needed_n > self.budget][0]} tokens without any history, "
                f"the limit is {self.budget}{raised}; use fewer candidates or slots, or shorter "
                "titles"
            )
        return self.budget - needed_n

    def latest(self, shown: Ragged, room_n: np.ndarray) -> Ragged:
        """The last pieces of each row, as many as have room for all their tokens."""
        count = self.pieces.count(shown)
        dropped_n = count[shown.ptr[1:]] - room_n  # tokens in front of the first that may stay
        return shown.keep(count[:-1] >= np.repeat(dropped_n, shown.lengths))
