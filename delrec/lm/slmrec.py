"""SLMRec (arXiv 2405.17890, section 4): the states of a teacher's layers for a smaller LM."""

import os

import numpy as np
import torch

from delrec.lm.reading import read_examples, read_prefix
from delrec.lm.text import width
from delrec.processes import gather_rows
from delrec.runtime import load_run, read_npy, stop
from delrec.training.log import Log


def blocks_of(layers, blocks):
    """The number of blocks that layers (a list of numbers) can all be cut into: `blocks`, or the
    most up to 4 if None.
    """
    fits = [b for b in range(1, min(layers) + 1) if not any(n % b for n in layers)]
    if blocks is None:
        return max(b for b in fits if b <= 4)
    if blocks not in fits:
        stop(
            f"--blocks {blocks} does not divide {' and '.join(map(str, layers))} layers; use one "
            f"of {', '.join(map(str, fits))}, or other --layers"
        )
    return blocks


def teacher_of(cfg, typed, data):
    """The teacher's run; its prompts are the student's, so flags that shape them take its values.

    A typed one that differs is refused.
    """
    run = load_run(cfg.teacher, data, stages=["finetune"])
    values = {**run.settings, "input": run.settings.get("input", "titles")}
    for key in ("input", "verbalizer", "show", "order", "history", "max_title", "max_tokens"):
        if key in typed and getattr(cfg, key) != values[key]:
            stop(
                f"--{key.replace('_', '-')} is {getattr(cfg, key)}, the teacher {run.folder} was "
                f"trained with {values[key]}; teacher and student must read the same "
                "prompts"
            )
        setattr(cfg, key, values[key])
    cfg.soft_prompt = cfg.soft_prompt or (
        str(run.folder) if (run.folder / "soft_prompt.safetensors").exists() else "none"
    )
    cfg.backbone = cfg.backbone or run.backbone_run
    return run


@torch.no_grad()
def teacher_states(teacher, blocks, n_reads, examples_of, micro, path, ranks):
    """What the teacher's blocks say at the reads of every training sample, in the samples' order:
    (bits of bf16 as int16 (N, b, D), memory-mapped; ptr (n+1,), sample i owns ptr[i]:ptr[i+1]).
    Computed once and written to `path`; dropout is off, so a second time would say the same.
    """
    ptr = np.concatenate([[0], np.cumsum(n_reads)])
    shape = (int(ptr[-1]), blocks, width(teacher.lm))
    if not path.exists():
        teacher.lm.model.eval()
        start, tmp = (
            read_prefix(teacher.lm, teacher.prompts.prefix, teacher.P),
            path.with_suffix(".tmp"),
        )
        file = np.lib.format.open_memmap(tmp, "w+", np.int16, shape) if ranks.main else None
        log = Log(None, len(n_reads), "teacher's states", ranks, "sample")
        for i in range(0, len(n_reads), micro * ranks.world):
            here = min(i + micro * ranks.world, len(n_reads))
            own = np.arange(
                min(i + micro * ranks.rank, here), min(i + micro * (ranks.rank + 1), here)
            )
            rows, index = np.zeros((0, *shape[1:]), np.float32), np.zeros(0, int)
            if len(own) or teacher.lm.sharded:
                batch = examples_of(teacher, own if len(own) else np.array([i]))
                read_examples(teacher.lm, start, batch)
                if len(own):
                    rows, index = (
                        torch.stack(teacher.lm.tapped, 1).float().cpu().numpy(),
                        np.concatenate(places(ptr, own)) - ptr[i],
                    )
            rows = gather_rows(rows, index, ptr[here] - ptr[i], ranks)
            if ranks.main:
                file[ptr[i] : ptr[here]] = (
                    torch.from_numpy(rows).bfloat16().view(torch.int16).numpy()
                )
            log.step(here)
        log.close()
        if ranks.main:
            file.flush()
            os.replace(tmp, path)
        if ranks.world > 1:
            torch.distributed.barrier()
    return read_npy(path, shape), ptr


def places(ptr, samples):
    """Where the reads of some samples stand among those of all, in the order of lm.read_examples:
    first each one's mask, then the other reads.
    """
    return [ptr[samples], *(np.arange(ptr[s] + 1, ptr[s + 1]) for s in samples)]
