"""The LM that stage 2 trains: opened with its soft prompt, its teacher and its maps; what of it
moves, what must hold at the end, and what is written.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from delrec.data.prepared import Data, histories
from delrec.lm import (
    adalora,
    counted,
    crossfit,
    ensemble,
    hints,
    items,
    layers,
    offsets,
    residual,
    slmrec,
    soft_prompt,
    twice,
    user_states,
    written,
)
from delrec.lm.kept import KeptLists
from delrec.lm.listed import backbone_of, lists_digest, say_if_another
from delrec.lm.lists import has_learnt, said_of_folds
from delrec.lm.model import LM, WAY, load_lm, located, must_be_of
from delrec.lm.ragged import of_padded
from delrec.lm.ranker import Ranker, make_ranker, settings_of
from delrec.lm.samples import Histories, Validation
from delrec.lm.summaries import OtherUsers
from delrec.lm.text import digest, fingerprint
from delrec.lm.windows import Windows
from delrec.metrics import chance
from delrec.processes import Ranks
from delrec.runtime import Run, follow_umask, load_run, stop, write_npy
from delrec.training import checkpoints
from delrec.training.averaged import Averaged
from delrec.training.loop import Loop
from delrec.training.run_folders import finish_run
from delrec.training.steps import evenly, forget_gradients, groups_of

PARTS = ("candidates", "titles", "cos", "norm", "logits", "ms", "kd", "rps", "apart")  # of the loss


@dataclass
class Origins:
    """The finished runs that stage 2 begins with; None where there is none of the kind."""

    teacher: Run | None  # --teacher
    prompt: Run | None  # whose soft prompt it takes
    start: Run | None  # --from


def parts_told(cfg: SimpleNamespace) -> tuple[str, ...]:
    """The parts of the loss that the log tells apart, where there may be several."""
    several = cfg.loss == "both" or cfg.teacher or cfg.lambda_ms or cfg.kd or cfg.keep_rps
    several = several or cfg.r_drop
    return PARTS if several else ()


def open_student(
    cfg: SimpleNamespace,
    data: Data,
    ranks: Ranks,
    origins: Origins,
    scores_of: residual.ScoresOf,
) -> tuple[Ranker, Ranker | None, torch.nn.ModuleDict]:
    """The LM to train as a ranker, its teacher (a ranker, or None), and the maps beside it.
    scores_of: asked with --residual, of the backbone."""
    prompt_run, start = origins.prompt, origins.start
    dtype = torch.float32 if cfg.adapt == "all" else None  # bf16 would round most steps away
    shard = cfg.shard and not cfg.layers
    lm = load_lm(cfg.llm, ranks.device, dtype, shard, cfg.check_llm)
    twice.stop_without_dropout(cfg, lm)
    if start:
        must_be_of(lm, start)
    P = soft_prompt.first_soft_prompt(cfg, prompt_run or start, lm)
    backbone, backbone_run = backbone_of(cfg.backbone, data, prompt_run or start)
    if cfg.residual:
        residual.stop_without_folds(backbone_run)
    if cfg.user_states:
        residual.stop_without_folds(backbone_run, "a soft prompt of distill.py --user-states")
    write_summaries(cfg, lm, data, backbone_run, ranks)
    settings = settings_of(cfg, backbone, backbone_run)
    say_notes(cfg, ranks, origins, backbone_run)
    if cfg.layers:
        layers.prune(lm, cfg.layers)
    teacher = None
    if origins.teacher:
        teacher = slmrec.open_teacher(origins.teacher, lm, cfg, data, ranks)
    if teacher or cfg.lambda_ms:
        slmrec.tap_blocks(lm, teacher, cfg)
    maps = maps_of(cfg, lm, backbone_run, data.n_items)
    if cfg.residual:
        maps = offsets.add_backbone(lm, cfg, data, (backbone_run, scores_of), maps)
        if cfg.residual_counts and ranks.main:
            print(counted.said(residual.weights_of(lm), data, cfg.val_samples), flush=True)
    if cfg.user_states:
        user_states.take_states(lm, cfg, data, backbone_run, scores_of, prompt_run.folder)
    if start and lm.items is not None:
        items.keep_maps(lm, start.folder)
    if teacher and lm.items is not None:
        items.share_maps(lm, teacher.lm)
    return make_ranker(lm, data, settings, P, cfg.cache_prefix), teacher, maps


def say_notes(cfg: SimpleNamespace, ranks: Ranks, origins: Origins, backbone_run: Path) -> None:
    """Prints what of the runs that stage 2 begins with may not be as one thinks: of another
    backbone, in or out of fold, in prompts of another format."""
    for run in filter(None, (origins.prompt, origins.teacher)):
        say_if_another(run, ranks)
    reads = cfg.input != "titles" or hints.reads_lists(cfg)
    if ranks.main and reads and (backbone_run / "config.json").exists():
        run = load_run(backbone_run)
        print(said_of_folds(backbone_run, getattr(run, "folds", 0), has_learnt(run)), flush=True)
    hints.say_what_differs(cfg, ranks)
    if origins.prompt:
        soft_prompt.say_if_of_another_format(origins.prompt, cfg, ranks)


def maps_of(cfg: SimpleNamespace, lm: LM, backbone_run: Path, n_items: int) -> torch.nn.ModuleDict:
    """The maps that train beside the LM: of item vectors, and behind its inner blocks."""
    maps, inner = torch.nn.ModuleDict(), len(lm.taps) if cfg.lambda_ms else 0
    on_vectors = cfg.input == "ids"
    if cfg.input != "titles":
        maps = items.first_maps(lm, cfg, backbone_run, n_items, inner if on_vectors else 0)
    if inner and not on_vectors:  # titles are scored by the head, which reads states
        maps = torch.nn.ModuleDict({**maps, **slmrec.identity_maps(lm, inner)})
    return maps


def write_summaries(
    cfg: SimpleNamespace, lm: LM, data: Data, backbone_run: Path, ranks: Ranks
) -> None:
    """With --summary recurrent, has the LM write the summaries that the run reads in training and
    in validation and nobody has written yet; cfg.summaries names where they are kept."""
    if "recurrent" not in (cfg.summary or ""):
        return
    written.must_write(lm)
    seen = Histories(cfg, data, backbone_run, cfg.samples // cfg.batch * cfg.batch)
    places = np.unique(np.concatenate([seen.places, data.val[Validation(cfg, data).which]]))
    old = of_padded(histories(data, places, cfg.history))
    if cfg.summary.startswith("permuted"):
        old = OtherUsers(data, cfg.history).histories(old)
    cfg.summaries = written.name_of(lm, data)
    author = written.Author(lm, data, cfg.summaries, cfg.llm, ranks)
    if author.write(old):
        written.show_some(author, old)
    lm.set_author(author)


def samples_of(cfg: SimpleNamespace, r: Ranker, n: int) -> Windows | Histories:
    """n training samples: windows of items, each of which is predicted, where the LM reads vectors
    and says something after each; else histories. None of a user that --without-fold leaves out."""
    if cfg.input == "ids" and r.lm.kind == "decoder":
        train = r.data.train[crossfit.may_learn_from(cfg, r.data, r.backbone_run)]
        return Windows(replace(r.data, train=train), cfg.history, n, cfg.seed)
    return Histories(cfg, r.data, r.backbone_run, n)


def made_with(
    cfg: SimpleNamespace, ranks: Ranks, r: Ranker, origins: Origins, lists: KeptLists | None
) -> dict:
    """What must be the same for a checkpoint to be continued."""
    made = checkpoints.made_with(cfg, r.data, ranks, r.lm.identity)
    made |= {WAY: r.lm.way, "wording": r.settings["wording"]}
    if r.P is not None:
        made["soft_prompt"] = digest(r.P)
    if r.settings["backbone_digest"]:
        made["backbone_digest"] = r.settings["backbone_digest"]
    if (
        cfg.residual or cfg.user_states or hints.reads_lists(cfg)
    ):  # samples without a list are left out
        made["lists_digest"] = lists_digest(r.backbone_run)
    if origins.teacher:
        made["teacher"] = slmrec.adapter_digest(origins.teacher)
    if cfg.kd:
        made["kd_digests"] = ensemble.digests(cfg)
    if origins.start:
        made["adapter"] = slmrec.adapter_digest(origins.start)
    if r.lm.items is not None:  # of a backbone, which may have been trained again meanwhile
        made["item_vectors"] = items.vectors_digest(r.lm)
    if lists:
        made["backbone_lists"] = lists.digest
    return made


def trials(r: Ranker, seen: Windows | Histories, losses_of: Callable) -> Iterator[tuple]:
    """The pair (loss, examples) that --micro auto tries; nothing is made before it is asked for."""
    r.lm.model.train()
    last = np.arange(len(seen.n_reads))[-64:]
    yield lambda batch: sum(losses_of(batch).values()), seen.prompts(r, last)


class Moving:
    """What stage 2 moves: adapters (with --adapt all the LM's own weights), maps, and with
    --lr-prompt the soft prompt."""

    def __init__(
        self,
        cfg: SimpleNamespace,
        r: Ranker,
        maps: torch.nn.ModuleDict,
        modules: list[str],
        n_steps: int,
        start: Run | None = None,
    ):
        self.cfg, self.r, self.maps = cfg, r, maps
        if cfg.adapt == "all":
            self.adapter, self.adapted = r.lm.model, layers.train_whole(r.lm)
        else:
            if start:
                self.adapter = adalora.go_on(r.lm, start, cfg.dropout)
            else:
                self.adapter = adalora.add_adalora(r.lm, modules, cfg, n_steps)
            self.adapted = [p for p in self.adapter.parameters() if p.requires_grad]
        if cfg.gradient_checkpointing:
            layers.checkpoint_layers(r.lm.model)
        self.first_values = [p.detach().clone() for p in self.adapted]
        self.first_P = None if r.P is None else r.P.clone()
        prompt = [r.P.requires_grad_()] if cfg.lr_prompt else []
        # with --residual what the LM says begins at 0, before the scores of a good model
        first = "out" if r.lm.offset is None else "offset"
        added = list(maps[first].parameters()) if cfg.residual else []
        trains = [p for p in maps.parameters() if p.requires_grad]  # not that of user states
        others = [p for p in trains if not any(p is q for q in added)]
        self.groups = groups_of(
            (self.adapted, cfg.lr),
            (others, cfg.lr_maps),
            (added, cfg.lr_residual),
            (prompt, cfg.lr_prompt),
        )
        self.params = [p for group in self.groups for p in group["params"]]
        self.mean = Averaged(self.params, cfg.ema)
        self.layers = adalora.adapted_layers(self.adapter)
        # singular values over all layers, at the beginning and at the end
        whole_rank = adalora.whole_rank(self.adapter)
        self.lora_ranks = [whole_rank, whole_rank if start else self.layers * cfg.target_r]

    def said(self) -> str:
        """What trains, in a line."""
        cfg, lm = self.cfg, self.r.lm
        whole = sum(p.numel() for p in [*lm.model.parameters(), *self.maps.parameters()])
        moved = sum(p.numel() for p in self.params)
        said = f"LM {cfg.llm} ({lm.kind}, {lm.dtype}): {moved:,} of {whole:,} parameters train; "
        if cfg.adapt == "all":
            return said + "no adapters, the weights of its layers themselves"
        said, (whole_rank, budget) = f"{said}{self.layers} layers adapted; ", self.lora_ranks
        if not adalora.last_cut(self.adapter):
            return f"{said}ranks stay {budget}, as the run had them that this one goes on from"
        first, last, n_steps = adalora.pruning_steps(self.adapter)
        return f"{said}ranks {whole_rank} -> {budget} between step {first} and {last} of {n_steps}"

    def reallocate(self, step: int) -> None:
        """Moves AdaLoRA's ranks after step number `step`, whose gradients it reads, and takes what
        trains into its mean."""
        adalora.reallocate(self.adapter, step)
        self.mean.take(adalora.ranks_are_final(self.adapter, step))

    def let_maps_rest(self, rest: bool) -> None:
        """Forgets the gradients of item vectors' maps in a step that shows no vector (LLaRA): of
        gradients of 0 Lion's momentum would move them on."""
        if rest:
            forget_gradients(self.r.lm.items.maps.parameters())

    def must_hold(self) -> None:
        """Stops unless what was adapted moved, its ranks came down to the budget, and the soft
        prompt stayed."""
        rank, P = adalora.active_rank(self.adapter), self.r.P
        budget = self.lora_ranks[1]
        if all(torch.equal(p, q) for p, q in zip(self.adapted, self.first_values)):
            stop(
                f"the {'LM' if self.cfg.adapt == 'all' else 'adapter'} did not move from where it "
                "began; nothing is saved; raise --lr or --samples"
            )
        if rank != budget:
            stop(
                f"AdaLoRA kept rank {rank} in all, its budget is {budget}; the adapter is not saved"
            )
        if P is not None and not self.cfg.lr_prompt and not torch.equal(P, self.first_P):
            stop(
                "the soft prompt moved during fine-tuning, it must stay as distill.py left it; "
                "nothing is saved"
            )


def validations(
    cfg: SimpleNamespace, adapter: torch.nn.Module, n_steps: int, n_val: int
) -> dict[int, float]:
    """{step (0 is the first) that ends with a validation: its cost in steps}, --evals of them: from
    where ranks are final on; with --adapt all, which has none, each after as many steps. With
    --from the one before the first step is one of them. n_val: samples that each asks."""
    first = n_steps / cfg.evals if cfg.adapt == "all" else adalora.last_cut(adapter)
    cost = n_val / cfg.batch / 3  # a forward pass is a third of a step
    return dict.fromkeys(evenly(cfg.evals, first, n_steps), cost)


# ---------------------------------------------------------------- what is written


def write_pruned(cfg: SimpleNamespace, lm: LM, out: Path, ranks: Ranks) -> dict:
    """What config.json says of the LM. With --layers, what is left of it is written to lm/; with
    --residual, the backbone to backbone/."""
    if ranks.main and (own := user_states.asked_of(lm)):
        residual.keep_backbone(own.folder, out)
    if not cfg.layers or cfg.adapt == "all":  # which is written once it is trained
        return {"llm_fingerprint": lm.identity}
    return write_lm(lm, out) if ranks.main else {}


def write_lm(lm: LM, out: Path) -> dict:
    """What config.json says of an LM that was cut or trained whole, which is written to lm/.
    llm_from: the LM that it was."""
    lm.model.save_pretrained(out / "lm")
    lm.tok.save_pretrained(out / "lm")
    follow_umask(out / "lm")
    place = str(out).removesuffix(".unfinished")
    known = {"llm_from": located(lm.name), "llm_fingerprint": fingerprint(lm)}
    return {"llm": str(Path(place) / "lm"), **known}


def write_parts(
    out: Path, r: Ranker, adapter: torch.nn.Module, neutral_I: np.ndarray, score_nC: np.ndarray
) -> dict:
    """Writes what a run folder holds of a trained LM; what config.json says of it anew. score_nC:
    of all validation samples, as the LM said them."""
    about_lm = {}
    if adalora.has_adapters(adapter):
        adapter.save_pretrained(out / "adapter")
        follow_umask(out / "adapter")
    else:
        about_lm = write_lm(r.lm, out)
    if r.P is not None:
        soft_prompt.save_soft_prompt(out, r.P)
    if r.lm.items is not None:
        items.save_items(r.lm, out)
    if r.lm.offset is not None:
        offsets.save_offset(r.lm, out)
    if residual.residual_of(r.lm):
        about_lm |= residual.told_of_weights(r.lm)
    if r.lm.tapped is not None:
        about_lm["blocks"] = len(r.lm.taps) + 1
    for ending in ("npy", "json"):
        (out / f"teacher_states.{ending}").unlink(missing_ok=True)
    write_npy(out / "neutral.npy", neutral_I)
    write_npy(out / f"scores_val_{score_nC.shape[1]}.npy", score_nC)
    return about_lm


def close_run(folder: Path, record: dict, loop: Loop, quality: tuple, n_val: int) -> None:
    """Puts the run in its place and prints what came of it. quality: HR@1, NDCG@10, calibrated."""
    record |= {
        **{key: record["settings"][key] for key in ("backbone_run", "backbone_digest")},
        "lm_share": loop.lm_share(),
        "samples_per_second": round(record["batch"] * loop.total / loop.spent["steps"], 3),
        "train_seconds": round(loop.spent["steps"], 3),
    }
    finish_run(folder, record, loop.earlier)
    print_result(folder, record, quality, n_val)


def print_result(folder: Path, record: dict, quality: tuple, n_val: int) -> None:
    """Prints what came of stage 2. quality: HR@1 and NDCG@10 of n_val validation samples."""
    first, last = record["rank"]
    share = record["lm_share"]
    kept = f"ranks stay {last}" if first else "no adapters"
    moved = kept if first == last else f"ranks reallocated {first} -> {last}"
    print(
        f"best step {record['best_step']}; {moved}; calibration weight {record['calibration']}; "
        f"{record['samples_per_second']:.2f} samples/s in training, {share:.0%} of the time in "
        "the LM"
    )
    result = {
        "stage": "finetune",
        "out": str(folder),
        "val_hr@1": round(quality[0], 4),
        "val_ndcg@10": round(quality[1], 4),
        "chance_hr@1": round(chance(record["C"])["hr@1"], 4),
        "n_val": n_val,
        "samples_per_second": round(record["samples_per_second"], 2),
        "lm_share": share,
        "seconds": record["seconds"],
        "peak_gb": record["peak_gb"],
    }
    print(json.dumps(result))
