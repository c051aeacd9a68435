"""What a soft prompt learnt (evaluate.py --ckpt RUN --probe).

Four looks at P, the k vectors of a run: the vocabulary's tokens nearest to each, their norms and
how alike they are (against the untrained vectors it began as); how much attention the place where
the LM is read pays to the instruction, the prompt, the history and the candidates; and a causal
test: the same LM ranks the same candidates with the trained prompt, with the untrained one and with
none, and we ask how near each ranking is to the backbone's (Kendall's tau, and how often both name
the same first).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from delrec.backbone.ranking import history_scorer
from delrec.data.prepared import Data, histories, subset, users
from delrec.data.run_files import finite_scores
from delrec.evaluation.drawing import BLUE, GREY, ORANGE, subplots
from delrec.evaluation.stats import difference, ends_of, interval
from delrec.evaluation.wording import ends_text, p_text
from delrec.lm.attention import PARTS, attention_from, labelled_prompt, telling
from delrec.lm.model import LM
from delrec.lm.ranker import Ranker, candidates_shown, make_ranker, open_run, score_samples
from delrec.lm.text import random_soft_prompt, token_scale
from delrec.metrics import agreement, kendall
from delrec.processes import Ranks
from delrec.runtime import Run, load_run, stop, write_json
from delrec.training.log import Log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 24  # prompts whose attention is looked at


# ---------------------------------------------------------------- the vectors


def nearest_tokens(lm: LM, P_kD: torch.Tensor, n: int = 5) -> list[list[tuple[str, float]]]:
    """[[(token, cosine)]] of each vector: its nearest rows of the embedding matrix, as the
    tokenizer writes them.
    """
    E_VD = lm.model.get_input_embeddings().weight.detach().float()
    E_VD = E_VD / E_VD.norm(dim=1, keepdim=True).clamp(min=1e-9)
    unit_kD = P_kD / P_kD.norm(dim=1, keepdim=True).clamp(min=1e-9)
    cos, at = (unit_kD @ E_VD.T).topk(n, dim=1)
    return [
        [(lm.tok.decode([int(t)]), round(float(c), 3)) for t, c in zip(*row)]
        for row in zip(at, cos)
    ]


def geometry(P_kD: torch.Tensor) -> dict[str, float]:
    """Norms and mutual cosines of the k vectors."""
    unit = P_kD / P_kD.norm(dim=1, keepdim=True).clamp(min=1e-9)
    cos = (unit @ unit.T)[~torch.eye(len(P_kD), dtype=bool, device=P_kD.device)]
    norm = P_kD.norm(dim=1)
    return {
        "norm": float(norm.mean()),
        "norm_min": float(norm.min()),
        "norm_max": float(norm.max()),
        "cosine": float(cos.mean()) if len(cos) else 0.0,
        "cosine_max": float(cos.max()) if len(cos) else 0.0,
    }


# ---------------------------------------------------------------- attention


@torch.no_grad()
def attention_shares(
    r: Ranker, samples: np.ndarray, cand_nC: np.ndarray, ranks: Ranks
) -> dict[str, tuple[float, float]]:
    """{part: (share of the attention, share of the tokens)} that the place where the LM is read
    pays to the instruction, the soft prompt, the history, the rest (candidates, words before the
    mask): means over layers, heads and samples. A decoder-only or an encoder LM, an
    encoder-decoder's encoder.
    """
    paid, tokens = np.zeros(len(PARTS)), np.zeros(len(PARTS))
    log = Log(None, len(samples), "attention", ranks, "prompt")
    with telling(r.lm.model):
        for n, old in enumerate(histories(r.data, samples, int(np.diff(r.data.ptr).max()))):
            prompt = labelled_prompt(r, old[old > 0], cand_nC[n])
            w_Q = attention_from(r, prompt)
            paid += np.bincount(prompt.part_Q, w_Q, len(PARTS)) / w_Q.sum()
            tokens += np.bincount(prompt.part_Q, minlength=len(PARTS)) / len(prompt.part_Q)
            log.step(n + 1)
    log.close()
    paid, tokens = paid / len(samples), tokens / len(samples)
    return {part: (float(a), float(t)) for part, a, t in zip(PARTS, paid, tokens)}


# ---------------------------------------------------------------- the causal test


@dataclass
class Nearness:
    """How near an LM's ranking is to the backbone's, for each sample."""

    tau_n: np.ndarray  # Kendall's tau
    same_n: np.ndarray  # agreement on the first place


def causal_test(
    run: Run,
    ranker: Ranker,
    prompts: dict[str, torch.Tensor | None],
    val: np.ndarray,
    teacher_nC: np.ndarray,
    ranks: Ranks,
) -> dict[str, Nearness]:
    """{name: Nearness} of the same LM with other soft prompts, {name: P_kD or None}, on samples of
    validation: the test part is not for looking around.
    """
    C = teacher_nC.shape[1]
    near = {}
    for name, P_kD in prompts.items():
        other = make_ranker(ranker.lm, ranker.data, run.settings, P_kD)
        score_nC = score_samples(other, "val", val, C, ranks, name=f"{name} prompt")
        near[name] = Nearness(kendall(score_nC, teacher_nC), agreement(score_nC, teacher_nC))
    return near


def means_of(near: dict[str, Nearness], user: np.ndarray) -> dict:
    """Mean nearness with each prompt, with intervals, as probe.json holds it."""
    return {
        name: {
            "kendall": float(v.tau_n.mean()),
            "kendall_interval": ends_of(interval(v.tau_n, user)),
            "same_first": float(v.same_n.mean()),
            "same_first_interval": ends_of(interval(v.same_n, user)),
        }
        for name, v in near.items()
    }


def differences_of(near: dict[str, Nearness], user: np.ndarray) -> dict:
    """How much nearer the trained prompt is than the others, with tests, as probe.json holds it."""
    trained, found = near["trained"], {}
    for name in ("untrained", "none"):
        tau = difference(trained.tau_n, near[name].tau_n, user)
        same = difference(trained.same_n, near[name].same_n, user)
        found[name] = {"kendall": tau["difference"], "p_kendall": tau["p"]}
        found[name] |= {"same_first": same["difference"], "p_same_first": same["p"]}
    return found


# ---------------------------------------------------------------- the whole


def probe(run: Run, data: Data, n: int, C: int, ranks: Ranks, out: Path) -> None:
    """Prints and writes probe.json and probe.png: what the soft prompt of a run learnt. n: samples
    of validation, 0 = all; out: the folder.
    """
    backbone = backbone_to_compare(run, data, C)
    ranker, _ = open_run(run, data, ranks.device, scores_of=history_scorer, ranks=ranks)
    P_kD = ranker.P.detach().float()
    fresh_kD = random_soft_prompt(ranker.lm, len(P_kD), seed_of_prompt(run))
    val = subset(len(data.val), n, 0)
    stored_nC = finite_scores(backbone.folder / f"scores_val_{C}.npy", data, "val", C, val)
    prompts = {"trained": P_kD, "untrained": fresh_kD, "none": None}
    near = causal_test(run, ranker, prompts, val, stored_nC, ranks)
    if not ranks.main:
        return
    samples = np.asarray(data.val)[val]
    user = users(data, samples)
    tokens = nearest_tokens(ranker.lm, P_kD)
    seen = attention_shares(ranker, samples[:SHOWN], shown_candidates(run, ranker, val, C), ranks)
    rows_VD = ranker.lm.model.get_input_embeddings().weight.detach().float()
    result = {
        "run": str(run.folder),
        "n": len(val),
        "candidates": C,
        "k": len(P_kD),
        "towards_the_backbone": means_of(near, user),
        "tests": differences_of(near, user),
        "geometry": {"trained": geometry(P_kD), "untrained": geometry(fresh_kD)},
        "moved": float((P_kD - fresh_kD).norm(dim=1).mean()),
        "token_norm": float(rows_VD.norm(dim=1).mean()) * token_scale(ranker.lm),
        "attention": {part: {"attention": a, "tokens": t} for part, (a, t) in seen.items()},
        "nearest": tokens,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "probe.json", result)
    about = (
        f"{run.folder.name}: {len(P_kD)} vectors in front of {run.llm}; {len(val)} validation "
        f"samples, {C} candidates, backbone {backbone.folder.name}"
    )
    print("\n" + "\n".join([about, "", *probe_lines(result)]) + "\n")
    picture(result).savefig(out / "probe.png", dpi=130)
    print(f"written: {out / 'probe.json'}, probe.png")
    print(last_line(result, out))


def backbone_to_compare(run: Run, data: Data, C: int) -> Run:
    """The backbone whose ranking the LM's is compared with; a run that cannot be probed is
    refused.
    """
    if run.soft_prompt in ("none", "words"):
        stop(
            f"{run.folder} has no soft prompt; --probe needs a run of distill.py, or one of "
            "finetune.py with a soft prompt"
        )
    backbone = load_run(run.backbone_run, data)
    if not (backbone.folder / f"scores_val_{C}.npy").exists():
        stop(
            f"{backbone.folder} holds no scores_val_{C}.npy to compare the LM with; train the "
            "backbone again, or give --candidates 15"
        )
    return backbone


def seed_of_prompt(run: Run) -> int:
    """The seed from which a run's soft prompt began: its own, or that of the distillation."""
    if run.stage == "distill" or run.soft_prompt == "random":
        return run.seed
    return load_run(run.soft_prompt).seed


def shown_candidates(run: Run, ranker: Ranker, val: np.ndarray, C: int) -> np.ndarray:
    """The candidates in the prompts whose attention is looked at, in their order there; none where
    the prompt lists none, or the LM reads a title at a time.
    """
    if run.settings["verbalizer"] == "likelihood" or not ranker.show:
        return np.zeros((min(len(val), SHOWN), 0), np.int64)
    return candidates_shown(ranker, "val", val, C)[1][:SHOWN]


# ---------------------------------------------------------------- written down


def probe_lines(result: dict) -> list[str]:
    """What is printed of a probe, as lines."""
    lines = [f"{'soft prompt':<12}{'tau with the backbone':>34}{'same first':>30}"]
    for name, m in result["towards_the_backbone"].items():
        ends, ends_first = ends_text(m["kendall_interval"]), ends_text(m["same_first_interval"])
        lines.append(
            f"{name:<12}{m['kendall']:>12.3f} {ends:<18}{m['same_first']:>10.3f} {ends_first}"
        )
    lines += [
        f"trained - {other}: tau {t['kendall']:+.3f} {p_text(t['p_kendall'])}, same first "
        f"{t['same_first']:+.3f} {p_text(t['p_same_first'])} (signs of users flipped)"
        for other, t in result["tests"].items()
    ]
    trained, untrained = result["geometry"]["trained"], result["geometry"]["untrained"]
    lines += [
        "",
        f"norm of a vector {trained['norm']:.2f} (untrained {untrained['norm']:.2f}, tokens "
        f"{result['token_norm']:.2f}); distance moved {result['moved']:.2f}; mutual cosine "
        f"{trained['cosine']:.3f} (untrained {untrained['cosine']:.3f}), largest "
        f"{trained['cosine_max']:.3f}",
        "",
        "attention from where the LM is read, over all layers and heads, "
        f"{min(result['n'], SHOWN)} prompts (share of the tokens)",
    ]
    for part, share in result["attention"].items():
        lines.append(f"  {part:<14}{share['attention']:.3f} ({share['tokens']:.3f})")
    near = result["nearest"]
    lines += ["", "nearest tokens of the vectors (cosine)"]
    for i, row in enumerate(near[:12]):
        lines.append(f"  {i:3} " + "  ".join(f"{token!r} {cos:.2f}" for token, cos in row[:3]))
    if len(near) > 12:
        lines.append(f"  .. {len(near) - 12} more in probe.json")
    return lines


def last_line(result: dict, out: Path) -> str:
    """The outcome as one JSON object."""
    moved = result["towards_the_backbone"]
    said = {"stage": "probe", "out": str(out), "n": result["n"]}
    said |= {f"kendall_{name}": round(m["kendall"], 4) for name, m in moved.items()}
    said |= {f"same_first_{name}": round(m["same_first"], 4) for name, m in moved.items()}
    return json.dumps(said)


def picture(result: dict) -> "Figure":
    """A figure: nearness to the backbone with each prompt, and where the attention goes."""
    fig, (left, right) = subplots(9, 3.4, columns=2)
    draw_nearness(left, result)
    draw_attention(right, result["attention"])
    return fig


def draw_nearness(ax: "Axes", result: dict) -> None:
    """Nearness to the backbone with each prompt, with intervals."""
    near = result["towards_the_backbone"]
    for shift, key, colour, label in (
        (-0.15, "kendall", BLUE, "Kendall's tau"),
        (0.15, "same_first", ORANGE, "same first place"),
    ):
        mean = np.array([m[key] for m in near.values()])
        ends = np.array([m[f"{key}_interval"] for m in near.values()], float)
        ax.errorbar(
            np.arange(len(near)) + shift,
            mean,
            yerr=np.maximum(np.abs(ends.T - mean), 0),
            fmt="o",
            capsize=3,
            color=colour,
            label=label,
        )
    names = ["no prompt" if name == "none" else f"{name} prompt" for name in near]
    ax.set_xticks(range(len(near)), names)
    ax.set_title(f"nearness to the backbone, n = {result['n']}", fontsize="medium")
    ax.legend(fontsize="small")
    ax.grid(axis="y", alpha=0.3)


def draw_attention(ax: "Axes", shares: dict[str, dict]) -> None:
    """Each part's share of the attention beside its share of the tokens."""
    for shift, key, colour in ((-0.2, "attention", BLUE), (0.2, "tokens", GREY)):
        ax.bar(
            np.arange(len(shares)) + shift,
            [share[key] for share in shares.values()],
            0.4,
            color=colour,
            label=f"share of the {key}",
        )
    ax.set_xticks(range(len(shares)), list(shares), fontsize="small")
    ax.set_title("attention from where the LM is read", fontsize="medium")
    ax.legend(fontsize="small")
