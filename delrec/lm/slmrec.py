"""SLMRec (arXiv 2405.17890, section 4): a small LM learns from the layers of a larger one.

Student and teacher are cut into b blocks each. x_t^j and x_s^j are their states after block j where
the LM is read. The student's loss is

    L = L_ce + l1 D_cos + l2 D_norm + l3 L_ms.

--lambda-logits adds what the paper leaves out, as a control: the KL divergence of the teacher's and
the student's scores.
"""

import copy
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from delrec.data.prepared import Data
from delrec.files import new_npy
from delrec.lm.layers import decoder_layers, tap
from delrec.lm.model import LM
from delrec.lm.prompts import DEFAULTS, settings_of_run
from delrec.lm.ranker import Ranker, open_run
from delrec.lm.reading import read_examples, read_prefix
from delrec.lm.samples import Histories
from delrec.lm.text import width
from delrec.lm.windows import Windows
from delrec.processes import Ranks, gather_rows
from delrec.runtime import Run, load_run, read_json, read_npy, stop, write_json
from delrec.training.checkpoints import Saver
from delrec.training.log import Log

# weights of the terms where nobody set them: with a teacher, by --norm; and alone
TAUGHT = {
    norm: dict(lambda_cos=1.0, lambda_norm=w, lambda_ms=0.1)
    for norm, w in (("l2", 0.1), ("squared", 1e-4))
}
ALONE = dict(lambda_cos=0.0, lambda_norm=0.0, lambda_ms=0.0)


def faults(cfg: SimpleNamespace) -> list[tuple]:
    """What cannot be meant with or without a teacher: [(is it so?, sentence)]."""
    taught = cfg.teacher or cfg.lambda_ms
    return [
        (
            cfg.shard and cfg.layers and not cfg.teacher and cfg.adapt != "all",
            "--layers cuts an LM that every process holds whole, so --shard would divide nothing; "
            "leave --shard out",
        ),
        (
            (cfg.lambda_cos or cfg.lambda_norm or cfg.lambda_logits) and not cfg.teacher,
            "--lambda-cos, --lambda-norm and --lambda-logits compare with a teacher, but there is "
            "no --teacher; name one or leave them out",
        ),
        (
            cfg.loss in ("titles", "both") and (cfg.input == "hybrid" or taught),
            f"--loss {cfg.loss} reads every title token of the history; --input hybrid, --teacher "
            "and --lambda-ms need --loss candidates or catalogue",
        ),
        (
            cfg.verbalizer == "likelihood" and taught,
            "--verbalizer likelihood reads a state per title token, teacher and student are "
            "compared at one: use --verbalizer mean, first or letter",
        ),
    ]


def settle_by_teacher(cfg: SimpleNamespace, typed: set[str], data: Data) -> Run:
    """The teacher's run; its prompts are the student's, so flags that shape them take its values.

    A typed one that differs is refused.
    """
    if cfg.maps:
        stop("--maps and --teacher both say what the maps begin as; leave one of them out")
    run = load_run(cfg.teacher, data, stages=["finetune"])
    if getattr(run, "residual", None):
        stop(
            f"the teacher {run.folder} adds to its backbone's scores (--residual), so its LM alone "
            "says little; name one without --residual"
        )
    if getattr(run, "user_states", None):
        stop(
            f"the items of the teacher {run.folder} carry user states (distill.py --user-states), "
            "which a student is not told; name a run on another soft prompt"
        )
    values = settings_of_run(run)
    for key in DEFAULTS:
        if key in typed and getattr(cfg, key) != values[key]:
            stop(
                f"--{key.replace('_', '-')} is {getattr(cfg, key)}, the teacher {run.folder} was "
                f"trained with {values[key]}; teacher and student must read the same prompts"
            )
        setattr(cfg, key, values[key])
    has_prompt = (run.folder / "soft_prompt.safetensors").exists()
    cfg.soft_prompt = cfg.soft_prompt or (str(run.folder) if has_prompt else "none")
    cfg.backbone = cfg.backbone or run.backbone_run
    return run


def open_teacher(run: Run, lm: LM, cfg: SimpleNamespace, data: Data, ranks: Ranks) -> Ranker:
    """The teacher as a ranker. It must come from the same LM as the student `lm`."""
    if cfg.shard and cfg.layers and ranks.main:
        print(
            "--shard divides the teacher's LM; the student's, which --layers cuts, is whole on "
            "every process",
            flush=True,
        )
    teacher, _ = open_run(run, data, ranks.device, cfg.shard, ranks=ranks)
    if teacher.lm.tok.get_vocab() != lm.tok.get_vocab() or width(teacher.lm) != width(lm):
        stop(
            f"the teacher {run.folder} has another tokenizer or width ({run.llm}, "
            f"{width(teacher.lm)}) than {cfg.llm} ({width(lm)}); teacher and student must come "
            "from the same LM"
        )
    return teacher


def adapter_digest(run: Run) -> str:
    """16 hex digits of a run's adapter; of its LM where that was trained without one."""
    if run.adapt == "all":
        return run.llm_fingerprint
    weights = (run.folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest()[:16]


# ---------------------------------------------------------------- blocks


def fitting(layers: list[int]) -> list[int]:
    """The numbers of blocks that layers (a list of numbers) can all be cut into."""
    return [b for b in range(1, min(layers) + 1) if not any(n % b for n in layers)]


def blocks_of(layers: list[int], blocks: int | None = None) -> int:
    """The number of blocks that layers (a list of numbers) are cut into: `blocks`, or the most up
    to 4 if None.
    """
    fits = fitting(layers)
    if blocks is None:
        return max(b for b in fits if b <= 4)
    if blocks not in fits:
        stop(
            f"--blocks {blocks} does not divide {' and '.join(map(str, layers))} layers; use one "
            f"of {', '.join(map(str, fits))}, or other --layers"
        )
    return blocks


def tap_blocks(lm: LM, teacher: Ranker | None, cfg: SimpleNamespace) -> None:
    """From now on both LMs keep their states after each of b blocks (lm.tapped). cfg: blocks,
    lambda_ms."""
    both = [teacher.lm, lm] if teacher else [lm]
    n_layers = [len(decoder_layers(m)[2]) for m in both]
    b = blocks_of(n_layers, cfg.blocks)
    if b == 1 and cfg.lambda_ms:
        stop(
            f"--lambda-ms {cfg.lambda_ms:g} asks the blocks before the last, but "
            f"{' and '.join(map(str, n_layers))} layers are cut into one; "
            f"use {more_blocks(n_layers)}--lambda-ms 0"
        )
    for each in both:
        tap(each, b)


def more_blocks(layers: list[int]) -> str:
    """The flags that give layers, of which the last are the student's, more blocks than one, each
    with an "or" behind it; nothing where none does."""
    *others, n = layers
    if several := fitting(layers)[1:]:
        return f"--blocks {several[0]}, or "
    depths = [d for d in range(2, max(layers) + 1) if blocks_of([*others, d]) > 1]
    near = sorted(depths, key=lambda d: abs(d - n))[:2]
    return "".join(f"--layers {d}, or " for d in sorted(near))


def identity_maps(lm: LM, n: int) -> torch.nn.ModuleDict:
    """W_1 .. W_n between states of the same width, which begin as the identity."""
    D = width(lm)
    maps = torch.nn.ModuleDict({f"block{j}": torch.nn.Linear(D, D) for j in range(1, n + 1)})
    for W_j in maps.values():
        torch.nn.init.eye_(W_j.weight)
        torch.nn.init.zeros_(W_j.bias)
    return maps.to(lm.device)


# ---------------------------------------------------------------- the terms of the loss


class Task(Protocol):
    """What a batch asks: ByTitles of finetune.py, or ByVectors of windows.py. States x are the LM's
    own, or with --input ids W x."""

    def loss_from(self, x_ND: torch.Tensor, batch: list, /) -> torch.Tensor:
        """The loss as a sum, from states x."""

    def scores_from(self, x_ND: torch.Tensor, batch: list, /) -> torch.Tensor:
        """The scores of the items that each read is asked for, from states x."""


@dataclass
class BlockLosses:
    """What SLMRec adds to the student's loss."""

    lm: LM  # the student, whose blocks are tapped
    maps: torch.nn.ModuleDict  # W_j as "block1", ..
    cfg: SimpleNamespace  # lambda_cos, lambda_norm, norm, lambda_logits, lambda_ms, input
    states: "TeacherStates | None"  # the teacher's; None without a teacher

    def __post_init__(self):
        # of vectors W_out reads the last states; the student's begins as its teacher's, which is
        # kept here, before anything moves
        on_vectors = self.cfg.input == "ids"
        self.read_s = self.lm.items.maps["out"] if on_vectors else torch.nn.Identity()
        self.read_t = copy.deepcopy(self.read_s).requires_grad_(False)

    def losses(self, task: Task, batch: list) -> dict[str, torch.Tensor]:
        """The terms as sums over the reads of a batch that the student has just read.
        task.loss_from gives the task's own loss from another state."""
        cfg, losses = self.cfg, {}
        if self.states:
            x_bND = torch.stack(self.lm.tapped).float()
            t_bND = self.states.of(batch).to(x_bND.device).float().transpose(0, 1)
            # D_cos = 1 - mean_j cos(x_t^j, x_s^j)
            D_cos = 1 - F.cosine_similarity(x_bND, t_bND, dim=2).mean(0)
            # D_norm = mean_j ||x_t^j - x_s^j|| (the paper's code), or of its square (the paper)
            distance_bN = torch.linalg.vector_norm(x_bND - t_bND, dim=2)
            D_norm = distance_bN.pow(2 if cfg.norm == "squared" else 1).mean(0)
            losses["cos"] = cfg.lambda_cos * D_cos.sum()
            losses["norm"] = cfg.lambda_norm * D_norm.sum()
            if cfg.lambda_logits:
                score_s = task.scores_from(self.read_s(x_bND[-1]), batch)
                score_t = task.scores_from(self.read_t(t_bND[-1]), batch)
                losses["logits"] = cfg.lambda_logits * kl(score_t, score_s)
        if cfg.lambda_ms:
            inner = self.lm.tapped[:-1]
            # L_ms = mean_{j<b} of the loss from W_j x_s^j; on vectors CE(y, softmax(E W_j x_s^j))
            mapped = [self.maps[f"block{j}"](x.float()) for j, x in enumerate(inner, 1)]
            total = sum(task.loss_from(x, batch) for x in mapped)
            losses["ms"] = cfg.lambda_ms * total / len(inner)
        return losses


def kl(score_t: torch.Tensor, score_s: torch.Tensor) -> torch.Tensor:
    """KL(p_t || p_s) = sum_i p_t(i) log(p_t(i) / p_s(i)), p the softmax of a row of scores, summed
    over the rows (N, asked)."""
    log_p_t, log_p_s = score_t.float().log_softmax(1), score_s.float().log_softmax(1)
    return F.kl_div(log_p_s, log_p_t, reduction="sum", log_target=True)


# ---------------------------------------------------------------- the teacher's states


@dataclass
class TeacherStates:
    """What the teacher's blocks say at the reads of every training sample."""

    bits: np.ndarray  # of bf16 as int16 (N, b, D), memory-mapped
    ptr: np.ndarray  # (n + 1,): the reads of sample i are ptr[i]:ptr[i+1]
    seconds: float  # that the teacher took to read them
    earlier: float = 0.0  # of these, those before the run was killed

    def in_record(self, record: dict) -> dict:
        """What config.json says of them: the teacher's time is the run's, as if it had begun so
        much before."""
        return {"states_seconds": self.seconds, "started": record["started"] - self.earlier}

    def of(self, batch: list) -> torch.Tensor:
        """The states (N, b, D) of the samples of a batch, in the order of read_examples."""
        rows = self.bits[np.concatenate(places(self.ptr, np.array([e.number for e in batch])))]
        return torch.from_numpy(rows).view(torch.bfloat16)


def places(ptr: np.ndarray, number_n: np.ndarray) -> list[np.ndarray]:
    """Where the reads of some samples stand among those of all, in the order of read_examples:
    first each one's mask, then the other reads.
    """
    return [ptr[number_n], *(np.arange(ptr[n] + 1, ptr[n + 1]) for n in number_n)]


@torch.no_grad()
def teacher_states(
    teacher: Ranker, samples: Histories | Windows, cfg: SimpleNamespace, saver: Saver
) -> TeacherStates:
    """The teacher's states at the reads of all training samples, written to teacher_states.npy in
    the folder of the run, and beside it the seconds that they took.

    A run that goes on from a checkpoint takes those that are there; of another run start_run left
    none. Dropout is off, so a second time would say the same.
    """
    ranks, began = saver.ranks, time.time()
    path = saver.folder.parent / "teacher_states.npy"
    if ranks.world > 1:  # the first process has emptied the folder by then
        torch.distributed.barrier()
    saver.must_fit()  # with other samples the states would be of another shape
    micro = 16 if cfg.micro == "auto" else cfg.micro
    ptr = np.concatenate([[0], np.cumsum(samples.n_reads)])
    shape = (int(ptr[-1]), len(teacher.lm.taps) + 1, width(teacher.lm))
    if path.exists():
        told = path.with_suffix(".json")
        seconds = read_json(told)["seconds"] if told.exists() else 0.0
        return TeacherStates(read_npy(path, shape), ptr, seconds, seconds)
    tmp = path.with_suffix(".tmp")
    file = new_npy(tmp, np.int16, shape) if ranks.main else None
    for first, last, rows in states_in_parts(teacher, samples, ptr, micro, ranks):
        if ranks.main:
            bits = torch.from_numpy(rows).bfloat16().view(torch.int16)
            file[ptr[first] : ptr[last]] = bits.numpy()
    seconds = round(time.time() - began, 3)
    if ranks.main:
        file.flush()
        write_json(path.with_suffix(".json"), {"seconds": seconds})
        os.replace(tmp, path)
    if ranks.world > 1:
        torch.distributed.barrier()
    return TeacherStates(read_npy(path, shape), ptr, seconds)


def states_in_parts(
    teacher: Ranker, samples: Histories | Windows, ptr: np.ndarray, micro: int, ranks: Ranks
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(first, last, states (N, b, D) fp32 of the samples first..last-1) one part after another,
    each shared among the processes and whole on all of them."""
    lm, n = teacher.lm, len(samples.n_reads)
    lm.model.eval()
    start = read_prefix(lm, teacher.prompts.prefix, teacher.P)
    log = Log(None, n, "teacher's states", ranks, "sample")
    for first in range(0, n, micro * ranks.world):
        last = min(first + micro * ranks.world, n)
        own = np.arange(first + micro * ranks.rank, first + micro * (ranks.rank + 1))
        own = own[own < last]
        rows, index = np.zeros((0, len(lm.taps) + 1, width(lm)), np.float32), np.zeros(0, int)
        if len(own) or lm.sharded:  # the passes of a sharded LM are made together
            which = own if len(own) else np.array([first])
            read_examples(lm, start, samples.prompts(teacher, which))
        if len(own):
            rows = torch.stack(lm.tapped, 1).float().cpu().numpy()
            index = np.concatenate(places(ptr, own)) - ptr[first]
        yield first, last, gather_rows(rows, index, int(ptr[last] - ptr[first]), ranks)
        log.step(last)
    log.close()
