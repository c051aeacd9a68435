"""Scoring and both stages' training with the embedded LM, against the rival."""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from delrec.data.prepared import Data
from delrec.kernels.bench import Row, times
from delrec.lm import reading
from delrec.lm.adalora import orthogonality
from delrec.lm.bench.rival import Rival, add_adalora, plain_orthogonality
from delrec.lm.bench.work import C, K, Prompts, flops, matmul_rate, our_ranker, place, prompts_of
from delrec.lm.layers import adapt_modules
from delrec.lm.model import LM
from delrec.lm.ragged import ragged
from delrec.lm.ranker import Ranker, score_tails
from delrec.lm.reading import read_prefix
from delrec.lm.text import random_soft_prompt
from delrec.training.memory import extra_bytes

MICRO = 4  # samples a pass, as in distill.py


@dataclass
class Pair:
    """Ours and the rival's, and where rows of their comparison go."""

    lm: LM
    data: Data  # a prepared folder, by load_data
    rival: Rival
    P: torch.Tensor  # the soft prompt of both
    rows: list[Row]

    @property
    def device(self) -> torch.device:
        """Where both LMs compute."""
        return self.lm.device

    @property
    def where(self) -> str:
        """cpu or gpu, as rows are named."""
        return place(self.lm.device)


@dataclass
class Training:
    """Samples of both stages: prompts whose next item is the candidate `truth`."""

    ranker: Ranker
    prompts: Prompts
    truth_B: torch.Tensor


def compare(rows: list[Row], lm: LM, data: Data) -> None:
    """Adds rows of scoring, of stage 1 and of stage 2."""
    P = random_soft_prompt(lm, K, 0)
    pair = Pair(lm, data, Rival(lm, data, P), P, rows)
    compare_scoring(pair, "mean", n=32, goal=2.2)
    compare_scoring(pair, "likelihood", n=4, goal=8)
    P.requires_grad_()
    r = our_ranker(lm, data, P, "mean")
    truth_B = torch.arange(8, device=lm.device) % C
    training = Training(r, prompts_of(r, data, len(truth_B), seed=1), truth_B)
    compare_stage_1(pair, training)
    P.requires_grad_(False)
    compare_stage_2(pair, training)


def memory_ratio(ours: Callable, theirs: Callable, device: torch.device) -> float | None:
    """Our peak memory over the rival's; None where this system does not tell."""
    memory = [extra_bytes(f, device) for f in (ours, theirs)]
    return None if None in memory else memory[0] / memory[1]


# ---------------------------------------------------------------- scoring


@torch.no_grad()
def compare_scoring(pair: Pair, verbalizer: str, n: int, goal: float) -> None:
    """Rows of scoring n prompts."""
    r = our_ranker(pair.lm, pair.data, pair.P, verbalizer)
    prompts = prompts_of(r, pair.data, n)
    alone = SimpleNamespace(rank=0, world=1, device=pair.device, main=False)

    def ours():  # what evaluate.py calls: like lengths together
        return torch.as_tensor(score_tails(r, prompts.tails, prompts.cand_BC, alone))

    def theirs():
        parts = [prompts.part(i, i + 16) for i in range(0, n, 16)]
        return torch.cat([pair.rival.scores(verbalizer, x.olds, x.cand_BC) for x in parts])

    stop_unless_alike(verbalizer, ours(), theirs())
    t = times({"ours": ours, "rival": theirs}, pair.device, 20.0, 5)
    name, rows = f"score.{verbalizer}.{pair.where}", pair.rows
    rows.append(Row(f"{name}.vs_rival", t["rival"] / t["ours"], "x", goal))
    rows.append(Row(f"{name}.requests_per_second", n / t["ours"], "1/s"))
    if verbalizer == "mean":
        memory = memory_ratio(ours, theirs, pair.device)
        rows.append(Row(f"{name}.memory_vs_rival", memory, "share", 0.6))
        rate = matmul_rate(pair.device, pair.lm.dtype)
        work = flops(pair.lm.model, sum(map(len, prompts.tails)))
        rows.append(Row(f"{name}.share_of_matmul_rate", work / t["ours"] / rate, "share"))
        rows.append(Row(f"matmul.{pair.where}.rate", rate / 1e9, "GFLOP/s"))


def stop_unless_alike(verbalizer: str, ours_BC: torch.Tensor, theirs_BC: torch.Tensor) -> None:
    """Ends the process if the scores of both do not go together."""
    pairs = zip(ours_BC.float().cpu().numpy(), theirs_BC.float().cpu().numpy())
    same = np.mean([np.corrcoef(ours, theirs)[0, 1] for ours, theirs in pairs])
    if same < 0.9:
        sys.exit(
            f"bench: ours and the rival's {verbalizer} scores correlate by {same:.2f} only; they "
            "do not do the same work"
        )


# ---------------------------------------------------------------- training


def compare_stage_1(pair: Pair, training: Training) -> None:
    """Rows of a step that trains the soft prompt."""
    lm, P, prompts = pair.lm, pair.P, training.prompts
    n = len(training.truth_B)
    idle = with_an_empty_body(lm)
    start = copy.copy(read_prefix(lm, prompts.prefix, P.detach()))
    start.P = None

    def ours():
        P.grad = None
        for i in range(0, n, MICRO):
            part, truth_B = prompts.part(i, i + MICRO), training.truth_B[i : i + MICRO]
            score_BC = part.score(lm, read_prefix(lm, prompts.prefix, P))
            (F.cross_entropy(score_BC, truth_B, reduction="sum") / n).backward()

    def theirs():
        P.grad = None
        score_BC = pair.rival.mean(prompts.olds, prompts.cand_BC)
        F.cross_entropy(score_BC, training.truth_B).backward()

    @torch.no_grad()
    def assembly():
        """Everything but the LM and the verbalizer: samples to prompts, prompts to rows, masks and
        places.
        """
        for i in range(0, n, MICRO):
            part = prompts.part(i, i + MICRO)
            tails, _ = training.ranker.prompts.histories(ragged(part.olds), part.cand_BC)
            reading.read(idle, start, tails, at=None)

    t = times({"ours": ours, "rival": theirs, "assembly": assembly}, pair.device, 20.0, 4)
    name, rows = f"train.stage1.{pair.where}", pair.rows
    rows.append(Row(f"{name}.assembly_share_of_step", t["assembly"] / t["ours"], "share", 0.02))
    rows.append(Row(f"{name}.vs_rival", t["rival"] / t["ours"], "x", 2.2))
    rows.append(Row(f"{name}.samples_per_second", n / t["ours"], "1/s"))
    memory = memory_ratio(ours, theirs, pair.device)
    rows.append(Row(f"{name}.memory_vs_rival", memory, "share", 0.6))


def with_an_empty_body(lm: LM) -> LM:
    """The LM with a body that does nothing, so that only what stands around it takes time."""

    def body(inputs_embeds, **_):
        return SimpleNamespace(last_hidden_state=torch.zeros_like(inputs_embeds))

    embeddings = lm.model.get_input_embeddings
    model = SimpleNamespace(
        base_model=body, config=lm.model.config, get_input_embeddings=embeddings
    )
    return replace(lm, model=model, paths=[path for path in lm.paths if path != "fused"])


def compare_stage_2(pair: Pair, training: Training) -> None:
    """Rows of a step that trains AdaLoRA."""
    lm, prompts, truth_B = pair.lm, training.prompts, training.truth_B
    modules = adapt_modules(lm, "qv")
    ours_adapter = add_adalora(lm.model, modules).train()
    theirs_adapter = add_adalora(pair.rival.model, modules).train()

    def ours():
        score_BC = prompts.score(lm, read_prefix(lm, prompts.prefix, pair.P))
        loss = F.cross_entropy(score_BC, truth_B) + 0.5 * orthogonality(ours_adapter)
        loss.backward()
        ours_adapter.base_model.update_and_allocate(1)
        ours_adapter.zero_grad(set_to_none=True)

    def theirs():
        score_BC = pair.rival.mean(prompts.olds, prompts.cand_BC)
        loss = F.cross_entropy(score_BC, truth_B) + 0.5 * plain_orthogonality(theirs_adapter)
        loss.backward()
        theirs_adapter.base_model.update_and_allocate(1)
        theirs_adapter.zero_grad(set_to_none=True)

    def adalora():
        (0.5 * orthogonality(ours_adapter)).backward()
        ours_adapter.base_model.update_and_allocate(1)

    t = times({"ours": ours, "rival": theirs}, pair.device, 20.0, 4)
    name, rows = f"train.stage2.{pair.where}", pair.rows
    rows.append(Row(f"{name}.vs_rival", t["rival"] / t["ours"], "x", 2.2))
    rows.append(Row(f"{name}.samples_per_second", len(truth_B) / t["ours"], "1/s"))
    for p in ours_adapter.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    share = times({"adalora": adalora}, pair.device, 2.0)["adalora"] / t["ours"]
    rows.append(Row(f"{name}.adalora_share_of_step", share, "share", 0.05))
