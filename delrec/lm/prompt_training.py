"""The LM of stage 1: frozen, with a soft prompt that trains; how that is validated, and written."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from delrec.data.prepared import Data, halves_of_validation, subset
from delrec.data.run_files import finite_scores
from delrec.lm import augment, items, residual, user_states
from delrec.lm.layers import adapt_modules, checkpoint_layers
from delrec.lm.lists import Lists, must_list
from delrec.lm.model import WAY, load_lm
from delrec.lm.questions import Question, tasks_of
from delrec.lm.ranker import (
    Ranker,
    asking,
    make_ranker,
    score_samples,
    score_tails,
    settings_of,
)
from delrec.lm.soft_prompt import save_soft_prompt
from delrec.lm.text import digest, random_soft_prompt
from delrec.lm.wording import wording_of
from delrec.metrics import agreement, kendall
from delrec.processes import Ranks
from delrec.runtime import follow_umask, stop
from delrec.training import checkpoints
from delrec.training.steps import groups_of

STORED = 15  # candidates that every preparation stores


def faults(cfg: SimpleNamespace) -> list[tuple]:
    """What cannot be meant in stage 1: [(is it so?, sentence)]."""
    return [*augment.faults(cfg), *user_states.faults(cfg)]


def open_frozen(
    cfg: SimpleNamespace, data: Data, ranks: Ranks, lists: Lists, scores_of: residual.ScoresOf
) -> Ranker:
    """The frozen LM as a ranker, with an untrained soft prompt (k, D), and with --input ids
    untrained maps of item vectors. scores_of: asked with --user-states, of the backbone."""
    must_list(lists, cfg, data)
    if cfg.user_states:
        residual.stop_without_folds(lists.folder, "--user-states")
    lm = load_lm(cfg.llm, ranks.device, shard=cfg.shard, checked=cfg.check_llm)
    P_kD = random_soft_prompt(lm, cfg.k, cfg.seed).requires_grad_()
    if cfg.input == "ids":
        if lm.kind != "decoder":
            stop(
                "--input ids reads a state after every item, which needs a decoder-only LM; "
                f"{cfg.llm} is an {lm.kind} LM"
            )
        torch.manual_seed(cfg.seed)
        items.load_items(lm, lists.folder, data.n_items)
    if cfg.user_states:
        user_states.add_states(lm, cfg, data, lists.folder, scores_of)
    settings = settings_of(cfg, lists.backbone, lists.folder)
    return make_ranker(lm, data, settings, P_kD, cfg.cache_prefix)


def made_with(cfg: SimpleNamespace, ranks: Ranks, r: Ranker, lists: Lists) -> dict:
    """What must be the same for a checkpoint to be continued."""
    made = checkpoints.made_with(cfg, r.data, ranks, r.lm.identity)
    made |= {WAY: r.lm.way, "wording": wording_of(r.settings, stage_1=True)}
    if cfg.augment or cfg.user_states:  # the backbone itself is asked
        made["backbone_digest"] = r.settings["backbone_digest"]
    made["backbone_lists"] = digest(torch.tensor(lists.train))
    if r.lm.items is not None:
        made["item_vectors"] = items.vectors_digest(r.lm)
    return made


class Moving:
    """What stage 1 moves: the soft prompt, the maps of item vectors, and with --lr-lm an adapter of
    the LM (DELRec's variant w UDPSM)."""

    def __init__(self, cfg: SimpleNamespace, r: Ranker):
        self.r, self.adapter, adapted = r, None, []
        maps = list(r.lm.items.maps.parameters()) if r.lm.items else []
        if cfg.gradient_checkpointing:
            checkpoint_layers(r.lm.model)
        if cfg.lr_lm:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(target_modules=adapt_modules(r.lm), r=8, lora_alpha=16)
            self.adapter = get_peft_model(r.lm.model, config)
            adapted = [p for p in self.adapter.parameters() if p.requires_grad]
        self.params = [r.P, *maps, *adapted]
        self.groups = groups_of(([r.P], cfg.lr), (maps, cfg.lr_maps), (adapted, cfg.lr_lm))

    def write(self, out: Path) -> None:
        """Writes the soft prompt, the maps and the adapter into a run folder."""
        save_soft_prompt(out, self.r.P)
        if self.r.lm.items is not None:
            items.save_items(self.r.lm, out)
        if own := user_states.users_of(self.r.lm):
            residual.keep_backbone(own.asked.folder, out)
        if self.adapter:
            self.adapter.save_pretrained(out / "adapter")
            follow_umask(out / "adapter")


# ---------------------------------------------------------------- validation


class Quiz:
    """The validation prompts of both tasks, {"ta": .., "rps": ..}, and what the LM scored on them
    before training. A part of a checkpoint."""

    def __init__(self, prompts: dict[str, list[Question]], chance: float):
        self.prompts, self.chance, self.before = prompts, chance, None

    def state_dict(self) -> dict:
        """What the LM scored before training."""
        return {"before": self.before}

    def load_state_dict(self, state: dict) -> None:
        """Sets what the LM scored before training."""
        self.before = state["before"]

    def ask(self, r: Ranker, ranks: Ranks, name: str) -> dict[str, float]:
        """Accuracy and loss of each task, which are also printed."""
        found = {}
        for task, prompts in self.prompts.items():
            accuracy, loss = accuracy_of(r, task, prompts, ranks, name)
            found |= {task: accuracy, f"{task}_loss": loss}
        said = [
            f"{task.upper()} accuracy {found[task]:.3f} loss {found[f'{task}_loss']:.3f} "
            f"(n={len(prompts)})"
            for task, prompts in self.prompts.items()
        ]
        if ranks.main:
            print(f"{name}: {', '.join(said)}, chance {self.chance:.3f}", flush=True)
        return found

    def quality(self, found: dict[str, float], tasks: str) -> float:
        """Minus the sum of the losses of the tasks that are trained ("both", "ta" or "rps")."""
        return -sum(found[f"{task}_loss"] for task in self.prompts if tasks in ("both", task))


def quiz_of(cfg: SimpleNamespace, r: Ranker, lists: Lists) -> Quiz:
    """The validation prompts of both tasks, always the same ones of the first half, as a Quiz."""
    which = asked_of_validation(cfg, r.data)
    top_nh = lists.top("val", which, cfg.h)
    ta, rps = tasks_of(r, r.data.val[which], top_nh, cfg, cfg.seed)
    if not ta and cfg.tasks != "rps":
        stop(
            f"no validation history has the {cfg.a + 2} items Temporal Analysis needs; lower --a "
            f"{cfg.a}, raise --val-samples {cfg.val_samples}, or leave it out with --tasks rps"
        )
    return Quiz({"ta": ta, "rps": rps} if ta else {"rps": rps}, 1 / cfg.C)


def asked_of_validation(cfg: SimpleNamespace, data: Data) -> np.ndarray:
    """The validation samples (places in data.val) that stage 1 asks about, of the first half."""
    first, _ = halves_of_validation(data)
    return first[subset(len(first), cfg.val_samples, cfg.seed)]


class Nearness:
    """How near an LM's ranking of validation samples is to the backbone's, over stored candidates:
    what evaluate.py --probe measures."""

    def __init__(self, cfg: SimpleNamespace, data: Data, backbone_run: Path):
        """Reads the backbone's scores; a folder of lists alone has none."""
        self.which, self.y_nC = asked_of_validation(cfg, data), None
        for C in (cfg.C, STORED):
            path = backbone_run / f"scores_val_{C}.npy"
            if self.y_nC is None and path.exists():
                self.y_nC = finite_scores(path, data, "val", C, self.which)

    def ask(self, r: Ranker, ranks: Ranks) -> dict[str, float]:
        """Means over the samples; nothing without the backbone's scores."""
        if self.y_nC is None:
            return {}
        n, C = self.y_nC.shape
        s_nC = score_samples(r, "val", self.which, C, ranks, name="agreement")
        near = {"same_first": agreement(s_nC, self.y_nC), "kendall": kendall(s_nC, self.y_nC)}
        means = {name: float(value_n.mean()) for name, value_n in near.items()}
        return means | {"n": n, "candidates": C}


def accuracy_of(
    r: Ranker, task: str, prompts: list[Question], ranks: Ranks, name: str
) -> tuple[float, float]:
    """The share of a task's prompts whose label scores highest (a tie counts as its share), and the
    mean cross-entropy; all processes share the work."""
    tails, cand_nC = [p.tail for p in prompts], np.stack([p.cand for p in prompts])
    olds = None
    if task == "rps":  # TA asks for an item that the states know
        olds = residual.histories_of(r.lm, r.data, np.array([p.sample for p in prompts]), False)
    name = f"{name} {task.upper()}"
    score_nC = score_tails(asking(r, task), tails, cand_nC, ranks, name, olds=olds)
    label_n = np.array([p.label for p in prompts])
    best_nC = score_nC == score_nC.max(1, keepdims=True)
    right_n = best_nC[np.arange(len(label_n)), label_n] / best_nC.sum(1)
    loss = F.cross_entropy(torch.as_tensor(score_nC), torch.as_tensor(label_n)).item()
    return float(right_n.mean()), loss


def print_result(
    folder: Path, record: dict, quiz: Quiz, found: tuple[dict, dict], rate: float
) -> None:
    """Prints what came of stage 1. found: what the quiz says after training, and the agreement with
    the backbone; rate: prompts a second in training."""
    before, (after, near) = quiz.before, found
    print(
        f"\nStage 1, {record['backbone']} -> {record['k']} vectors of {record['llm']}; accuracy on "
        f"{len(quiz.prompts['rps'])} validation samples, {record['C']} candidates, chance "
        f"{quiz.chance:.3f}"
    )
    for task, prompts in quiz.prompts.items():
        print(
            f"  {task.upper():4} before {before[task]:.3f}  after {after[task]:.3f}   "
            f"(n={len(prompts)})"
        )
    if near:
        print(
            f"  agreement with {record['backbone']}: same first {near['same_first']:.3f} (chance "
            f"{1 / near['candidates']:.3f}), Kendall's tau {near['kendall']:.3f} (n={near['n']}, "
            f"{near['candidates']} candidates)"
        )
    share = record["lm_share"]
    print(f"  {rate:.2f} prompts/s in training, {100 * share:.0f} % of the time in the LM")
    tasks = [(task, when) for task in quiz.prompts for when in ("before", "after")]
    said = {"before": before, "after": after}
    result = {
        "stage": "distill",
        "out": str(folder),
        "chance": round(quiz.chance, 4),
        **{f"{task}_{when}": round(said[when][task], 4) for task, when in tasks},
        **{name: round(near[name], 4) for name in ("same_first", "kendall") if near},
        "samples_per_second": round(rate, 2),
        "lm_share": share,
        "seconds": record["seconds"],
        "peak_gb": record["peak_gb"],
    }
    print(json.dumps(result))
