"""Summaries that an LM writes (finetune.py --summary recurrent): LLM-TRSR, arXiv 2403.13325,
section 4.2. Of the blocks of a history, the oldest first,

    S_1 = LM(block 1),  S_n = LM(S_{n-1}, block n),

greedy, each when it is first asked for: finetune.py writes those of its own samples before the
training, evaluate.py what its samples and histories still lack. A file beside the data keeps them,
so that every run with the same LM reads the same, and none is written twice.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import click
import numpy as np
import torch

from delrec.data.prepared import Data
from delrec.lm.line_file import add_lines, alone_with, lines_from
from delrec.lm.model import LM, load_lm
from delrec.lm.ragged import Ragged
from delrec.lm.text import embed, encode
from delrec.processes import Ranks, gather_rows, of_main, shares
from delrec.runtime import stop, write_text
from delrec.training.log import Log

BLOCK = 5  # items of a block
NEW = 40  # tokens of a summary at most
PASS = 32  # prompts that are written on together
KEPT = 64  # summaries of a process from one writing of the file to the next
SHOWN = 10  # of which a person can read what was asked and written
ASKED = "{noun}s the user {verb}: {titles}.\nIn one sentence, the user likes"
ASKED_BEFORE = "What is known of the user: {before}\n"


@dataclass
class Chapter:
    """A block of a history, with the key of what was written before it."""

    items: tuple[int, ...]
    before: str | None


def keys_of(data: Data, items: np.ndarray) -> list[str]:
    """A key for the history up to the end of each of its blocks, the whole one's last: by titles,
    which are all that the LM is told, so that added items have keys too."""
    h, keys = hashlib.sha256(), []
    for i in range(0, len(items), BLOCK):
        h.update("\n".join(["", *(data.titles[item] for item in items[i : i + BLOCK])]).encode())
        keys.append(h.hexdigest()[:16])
    return keys


def name_of(lm: LM, data: Data) -> str:
    """16 hex digits that tell summaries apart: by LM, preparation, and what is asked."""
    told = [lm.identity, data.meta["hash"], ASKED, ASKED_BEFORE, str(NEW), str(BLOCK)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- who writes them


@dataclass
class Author:
    """Who writes the summaries that a run's prompts tell: the LM that the run began with. All
    processes ask it the same; the first one alone reads and writes the file."""

    lm: LM  # the run's own, which may be what was made of that one
    data: Data
    name: str  # of its summaries (name_of)
    origin: str  # the LM's name
    ranks: Ranks
    says: bool = True  # is progress shown?
    texts: dict[str, str] = field(default_factory=dict)  # {key of a history: its summary}
    read_to: int = 0  # bytes of the file that are known
    writer: LM | None = None  # the LM itself, once it is needed
    forgets: bool = False  # can what it writes not be kept?

    @property
    def path(self) -> Path:
        """Where the summaries are kept."""
        return self.data.folder / f"summaries-{self.name}.jsonl"

    def of(self, items: np.ndarray) -> str:
        """The summary of a history that `write` was asked about."""
        return self.texts[keys_of(self.data, items)[-1]]

    def write(self, old: list[np.ndarray] | Ragged) -> int:
        """Writes the summaries of some histories that nobody has written yet; how many."""
        todo, log, total = chapters_of(self.data, old, self.texts), None, 0
        while any(todo):
            with self.file() as file:
                todo = self.missing(todo)
                left = sum(map(len, todo))
                total = total or left
                if left and self.says:
                    log = log or Log(None, total, "summaries", self.ranks, "summary")
                    log.step(total - left)
                if left:
                    self.write_some(next(filter(None, todo)), file)
            todo = self.missing(todo)
        if log:
            log.step(total)
            log.close()
        return total

    def missing(self, levels: list[dict[str, Chapter]]) -> list[dict[str, Chapter]]:
        """Those chapters of which nobody has written a summary."""
        return [{key: x for key, x in level.items() if key not in self.texts} for level in levels]

    def write_some(self, level: dict[str, Chapter], file: BinaryIO | None) -> None:
        """Writes some of the summaries of chapters, whose earlier ones are known."""
        lm = self.writer = self.writer or self.found()
        keys = sorted(level)[: KEPT * self.ranks.world]
        prompts = [tokens_asked(lm, self.data, level[key], self.texts) for key in keys]
        with as_loaded(lm):
            new = dict(zip(keys, continued(lm, prompts, self.ranks)))
        self.texts |= new
        if self.ranks.main:
            self.keep(new, file)

    def keep(self, new: dict[str, str], file: BinaryIO | None) -> None:
        """Adds summaries to the file. Where it cannot be written a line says so, once."""
        why = f"{self.path} cannot be written"
        if file is not None:
            try:
                return add_lines(file, [json.dumps(x, ensure_ascii=False) for x in new.items()])
            except OSError as bad:
                why = bad
        if not self.forgets:
            print(f"note: summaries are not kept, but for this command alone: {why}", flush=True)
        self.forgets = True

    @contextlib.contextmanager
    def file(self) -> Iterator[BinaryIO | None]:
        """The file, which no other process adds to meanwhile; None where it cannot be written, and
        in all processes but the first. What others have added to it is known then."""
        with contextlib.ExitStack() as stack:
            file, lines = None, b""
            if self.ranks.main:
                with contextlib.suppress(OSError):  # one may read what one may not write
                    file = stack.enter_context(alone_with(self.path))
                lines, self.read_to = lines_from(self.path, self.read_to)
            for key, text in pairs_in(of_main(lines, self.ranks)):
                self.texts.setdefault(key, text)
            yield file

    def found(self) -> LM:
        """The LM that wrote the first summaries; stops where it cannot be had."""
        if name_of(self.lm, self.data) == self.name:
            must_write(self.lm)
            return self.lm
        begin = f"summaries are written by {self.origin}, which the run began with, but "
        try:
            lm = load_lm(self.origin, self.lm.device)
        except click.ClickException as bad:
            stop(
                f"{begin}it cannot be had ({bad.message}); bring it back, or take a run of "
                "finetune.py --summary words"
            )
        if name_of(lm, self.data) != self.name:
            stop(
                f"{begin}it is another LM now, or delrec/lm/written.py asks it in other words; "
                "bring back what was, or train the run again"
            )
        return lm


def pairs_in(lines: bytes) -> Iterator[tuple[str, str]]:
    """The keys and summaries of the lines of a file."""
    for line in lines.splitlines():
        try:
            key, text = json.loads(line)
        except (ValueError, TypeError):  # somebody was killed in it
            continue
        yield key, text


def must_write(lm: LM) -> None:
    """Stops where an LM cannot write."""
    if lm.kind == "encoder":
        stop(
            f"recurrent summaries are written by the LM, but {lm.name} is an encoder LM, which "
            "writes nothing; use finetune.py --summary words"
        )
    if lm.sharded:
        stop(
            f"recurrent summaries are written by the LM, but {lm.name} is divided among processes; "
            "leave --shard out, or use finetune.py --summary words"
        )


@contextlib.contextmanager
def as_loaded(lm: LM) -> Iterator[None]:
    """Within it an LM is the one that was loaded, without the adapter of a run."""
    lm.model.eval()
    with lm.adapter.disable_adapter() if lm.adapter else contextlib.nullcontext():
        yield


def chapters_of(
    data: Data, old: list[np.ndarray] | Ragged, known: dict[str, str]
) -> list[dict[str, Chapter]]:
    """[{key: chapter}] of the first blocks, the second ones, ..: those that are not known, of
    histories whose summary is not known."""
    levels = []
    for items in old:
        keys = keys_of(data, items)
        if not keys or keys[-1] in known:
            continue
        levels += [{} for _ in range(len(keys) - len(levels))]
        for n, (key, before) in enumerate(zip(keys, [None, *keys])):
            if key not in known:
                block = items[n * BLOCK : (n + 1) * BLOCK]
                levels[n][key] = Chapter(tuple(block.tolist()), before)
    return levels


def tokens_asked(lm: LM, data: Data, chapter: Chapter, texts: dict[str, str]) -> np.ndarray:
    """The prompt of a chapter; too long a one loses its beginning."""
    words = data.meta["words"]
    titles = "; ".join(data.titles[i] for i in chapter.items)
    text = ASKED.format(noun=words["noun"].capitalize(), verb=words["verb"], titles=titles)
    if chapter.before:
        text = ASKED_BEFORE.format(before=texts[chapter.before]) + text
    room = lm.max_tokens - NEW - len(lm.start) - len(lm.end)
    return np.array([*lm.start, *encode(lm, text)[-room:], *lm.end], np.int64)


def continued(
    lm: LM,
    prompts: list[np.ndarray],
    ranks: Ranks,
    P_kD: torch.Tensor | None = None,
    most: int | None = None,
) -> list[str]:
    """What the LM writes behind each prompt, its first line, the same on every process. P_kD: what
    stands at a prompt's slots; most: tokens that it may write, NEW if not given."""
    most = most or NEW
    order = np.argsort([-len(p) for p in prompts], kind="stable")
    passes = [order[i : i + PASS] for i in range(0, len(order), PASS)]
    mine, rows = [np.zeros(0, int)], [np.zeros((0, most))]
    for some, _ in shares(passes, ranks):
        mine.append(some)
        rows.append(greedy(lm, [prompts[i] for i in some], most, P_kD))
    mine = np.concatenate(mine)
    row_nT = gather_rows(np.concatenate(rows), mine, len(prompts), ranks).astype(np.int64)
    texts = [lm.tok.decode(row[row >= 0], skip_special_tokens=True) for row in row_nT]
    return [" ".join((text.strip().splitlines() or [""])[0].split()) for text in texts]


@torch.no_grad()
def greedy(
    lm: LM, prompts: list[np.ndarray], most: int, P_kD: torch.Tensor | None = None
) -> np.ndarray:
    """The tokens (B, most) that the LM writes greedily behind each prompt, -1 behind its end: by
    transformers' own generation, whose first token behind an end is padding."""
    longest, B = max(map(len, prompts)), len(prompts)
    ids, real = np.zeros((B, longest), np.int64), np.zeros((B, longest), np.int64)
    for row, (own, told) in enumerate(zip(ids, real)):
        n = len(prompts[row])
        side = slice(longest - n, longest) if lm.kind == "decoder" else slice(0, n)
        own[side], told[side] = prompts[row], 1
    with its_head(lm):
        out = lm.model.generate(
            inputs_embeds=embed(lm, ids, P_kD),
            attention_mask=torch.as_tensor(real, device=lm.device),
            max_new_tokens=most,
            do_sample=False,
            num_beams=1,
            pad_token_id=0 if lm.tok.pad_token_id is None else lm.tok.pad_token_id,
        )
    new = out if lm.kind == "decoder" else out[:, 1:]  # behind the token that a decoder begins with
    new, ends = new.cpu().numpy(), lm.model.generation_config.eos_token_id
    found = np.full((B, most), -1)
    found[:, : new.shape[1]] = new
    over = np.cumsum(np.isin(found, [] if ends is None else ends), 1) > 0
    return np.where(over, -1, found)


@contextlib.contextmanager
def its_head(lm: LM) -> Iterator[None]:
    """Within it the LM's logits are its own, not the states that its head would read."""
    head = lm.model.get_output_embeddings()
    bare = vars(head).pop("forward", None)
    try:
        yield
    finally:
        if bare is not None:
            head.forward = bare


def show_some(author: Author, old: Ragged) -> None:
    """Writes a file beside the summaries that shows some histories with theirs, for a person."""
    lines = []
    longest = np.argsort(-old.lengths, kind="stable")
    for items in (old[i] for i in longest[:: max(len(old) // SHOWN, 1)][:SHOWN]):
        lines += [f"- {author.data.titles[i]}" for i in items]
        lines += [f"=> {author.of(items)}" if len(items) else "=>", ""]
    if author.ranks.main and not author.forgets:
        write_text(author.path.with_suffix(".txt"), "\n".join(lines))
