"""Summaries that an LM writes (finetune.py --summary recurrent): LLM-TRSR, arXiv 2403.13325,
section 4.2. Of the blocks of a history, the oldest first,

    S_1 = LM(block 1),  S_n = LM(S_{n-1}, block n),

greedy, before the training, each once: a file beside the data keeps them, so that every run with
the same LM reads the same.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from delrec.data.fetch import one_at_a_time
from delrec.data.prepared import Data
from delrec.lm.model import LM
from delrec.lm.ragged import Ragged
from delrec.lm.text import embed, encode
from delrec.processes import Ranks, gather_rows, shares
from delrec.runtime import must_be_writable, read_json, stop, write_json, write_text
from delrec.training.log import Log

BLOCK = 5  # items of a block
NEW = 40  # tokens of a summary at most
PASS = 32  # prompts that are written on together
KEPT = 256  # summaries from one writing of the file, and saying how far it is, to the next
SHOWN = 10  # of which a person can read what was asked and written
ASKED = "{noun}s the user {verb}: {titles}.\nIn one sentence, the user likes"
ASKED_BEFORE = "What is known of the user: {before}\n"


@dataclass
class Chapter:
    """A block of a history, with the key of what was written before it."""

    items: tuple[int, ...]
    before: str | None


def keys_of(items: np.ndarray) -> list[str]:
    """A key for the history up to the end of each of its blocks, the whole one's last."""
    h, keys = hashlib.sha256(), []
    for i in range(0, len(items), BLOCK):
        h.update(np.asarray(items[i : i + BLOCK], np.int64).tobytes())
        keys.append(h.hexdigest()[:16])
    return keys


def name_of(lm: LM, data: Data) -> str:
    """16 hex digits that tell summaries apart: by LM, preparation, and what is asked."""
    told = [lm.identity, data.meta["hash"], ASKED, ASKED_BEFORE, str(NEW), str(BLOCK)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def file_of(data: Data, name: str) -> Path:
    """Where the summaries of a name are kept."""
    return data.folder / f"summaries-{name}.json"


def texts_of(data: Data, name: str) -> dict[str, str]:
    """{key of a history: its summary} as they were kept."""
    path = file_of(data, name)
    if not path.exists():
        stop(
            f"{path} is not there, and with it the summaries that the run was trained with; bring "
            "it back, or train the run again"
        )
    return read_json(path)


# ---------------------------------------------------------------- writing them


def write_missing(lm: LM, data: Data, old: Ragged, ranks: Ranks) -> str:
    """Writes the summaries of histories that nobody has written yet; the name they are kept by."""
    if lm.kind == "encoder" or lm.sharded:
        said = "is an encoder LM, which writes nothing" if lm.kind == "encoder" else "is sharded"
        stop(f"--summary recurrent is written by the LM, but {lm.name} {said}; use --summary words")
    name = name_of(lm, data)
    path = file_of(data, name)
    with alone(f"summaries-{name}", ranks):
        texts = read_json(path) if path.exists() else {}
        todo = chapters_of(old, texts)
        total, done = sum(map(len, todo)), 0
        if not total:
            return name
        must_be_writable(data.folder)
        log = Log(None, total, "summaries", ranks, "summary")
        for level in todo:
            keys = sorted(level)
            for i in range(0, len(keys), KEPT):
                some = keys[i : i + KEPT]
                prompts = [tokens_asked(lm, data, level[key], texts) for key in some]
                texts |= zip(some, continued(lm, prompts, ranks))
                done += len(some)
                log.step(done)
                if ranks.main:
                    write_json(path, texts)
        log.close()
        if ranks.main:
            write_text(path.with_suffix(".txt"), shown(data, old, texts))
    return name


@contextlib.contextmanager
def alone(name: str, ranks: Ranks) -> Iterator[None]:
    """Within it no other run writes the same summaries; its own processes come and go together."""
    with one_at_a_time(name) if ranks.main else contextlib.nullcontext():
        if ranks.world > 1:
            torch.distributed.barrier()
        yield
        if ranks.world > 1:
            torch.distributed.barrier()


def chapters_of(old: Ragged, known: dict[str, str]) -> list[dict[str, Chapter]]:
    """[{key: chapter}] of the first blocks, the second ones, ..: those that are not known."""
    levels = []
    for items in old:
        before = None
        for n, key in enumerate(keys_of(items)):
            if len(levels) <= n:
                levels.append({})
            if key not in known:
                block = items[n * BLOCK : (n + 1) * BLOCK]
                levels[n][key] = Chapter(tuple(block.tolist()), before)
            before = key
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


def shown(data: Data, old: Ragged, texts: dict[str, str]) -> str:
    """Some histories with their summaries, for a person."""
    lines = []
    longest = np.argsort(-old.lengths, kind="stable")
    for items in (old[i] for i in longest[:: max(len(old) // SHOWN, 1)][:SHOWN]):
        lines += [f"- {data.titles[i]}" for i in items]
        lines += [f"=> {texts[keys_of(items)[-1]]}" if len(items) else "=>", ""]
    return "\n".join(lines)
