"""What a soft prompt learnt (evaluate.py --ckpt RUN --probe).

Four looks at P, the k vectors of a run: the vocabulary's tokens nearest to each, their norms and
how alike they are (against the untrained vectors it began as); how much attention the place where
the LM is read pays to the instruction, the prompt, the history and the candidates; and a causal
test: the same LM ranks the same candidates with the trained prompt, with the untrained one and with
none, and we ask how near each ranking is to the backbone's (Kendall's tau, and how often both name
the same first).
"""

import json

import numpy as np
import torch

from delrec.data.prepared import candidates, histories, subset, users
from delrec.evaluation import report
from delrec.evaluation.stats import interval, paired_t
from delrec.lm.ranker import listing, make_ranker, open_run, score_samples
from delrec.lm.text import MASK, SLOT, embed, random_soft_prompt, token_scale
from delrec.runtime import load_run, read_npy, stop, write_json
from delrec.training.log import Log


def kendall(a_nC, b_nC):
    """Kendall's tau-b of each row of two scores (n, C): 1 the same order, 0 no relation, -1 the
    reverse; pairs tied in one count for half its weight.
    """
    i, j = np.triu_indices(a_nC.shape[1], 1)
    x, y = np.sign(a_nC[:, i] - a_nC[:, j]), np.sign(b_nC[:, i] - b_nC[:, j])
    return (x * y).sum(1) / np.maximum(np.sqrt((x != 0).sum(1) * (y != 0).sum(1)), 1)


def agreement(a_nC, b_nC):
    """Share of the first place that two scores name alike: 1 if the same one candidate, less where
    first places are tied.
    """

    def first(s):
        return (s == s.max(1, keepdims=True)) / (s == s.max(1, keepdims=True)).sum(1, keepdims=True)

    return np.minimum(first(a_nC), first(b_nC)).sum(1)


def nearest_tokens(lm, P_kD, n=5):
    """[[(token, cosine)]] of each vector: its nearest rows of the embedding matrix, as the
    tokenizer writes them.
    """
    E_VD = lm.model.get_input_embeddings().weight.detach().float()
    E_VD = E_VD / E_VD.norm(dim=1, keepdim=True).clamp(min=1e-9)
    cos, at = (P_kD / P_kD.norm(dim=1, keepdim=True).clamp(min=1e-9) @ E_VD.T).topk(n, dim=1)
    return [
        [(lm.tok.decode([int(t)]), round(float(c), 3)) for t, c in zip(*row)]
        for row in zip(at, cos)
    ]


def geometry(P_kD):
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


@torch.no_grad()
def attention_shares(r, samples, cand_nC, ranks):
    """{part: (share of the attention, share of the tokens)} that the place where the LM is read
    pays to the instruction, the soft prompt, the history, the rest (candidates, words before the
    mask): means over layers, heads and samples. A decoder-only or an encoder LM, an
    encoder-decoder's encoder.
    """
    lm, parts = r.lm, ("instruction", "soft prompt", "history", "the rest")
    body = lm.model.get_encoder() if lm.kind == "encoder-decoder" else lm.body
    lm.model.eval()
    before = lm.model.config._attn_implementation
    lm.model.set_attn_implementation("eager")  # the one that tells its weights
    paid, tokens = np.zeros(4), np.zeros(4)
    log = Log(None, len(samples), "attention", ranks, "prompt")
    for n, old in enumerate(histories(r.data, samples, r.history)):
        tail, at = r.prompts.history(old[old > 0], cand_nC[n])
        prefix, ids = r.prompts.prefix, np.concatenate([r.prompts.prefix, tail])
        part = np.full(len(ids), 3)
        # the prefix's last token begins the tail
        part[: len(prefix) + 1] = 0
        part[np.flatnonzero(ids == SLOT)] = 1
        part[len(prefix) + at] = 2
        mask = int(np.flatnonzero(ids == MASK)[0])
        # what is read is the state before the mask
        if lm.kind == "decoder":
            ids, part, mask = ids[:-1], part[:-1], mask - 1
        else:
            ids = np.concatenate([np.where(ids == MASK, lm.mask_id, ids), lm.end]).astype(np.int64)
            part = np.concatenate([part, np.full(len(lm.end), 3)])
        more = {"use_cache": False} if lm.kind == "decoder" else {}
        out = body(
            inputs_embeds=embed(lm, torch.as_tensor(ids, device=lm.device)[None], r.P),
            output_attentions=True,
            **more,
        )
        w_Q = (
            torch.stack([a[0, :, mask].float().mean(0) for a in out.attentions])
            .mean(0)
            .cpu()
            .numpy()
        )
        paid += np.bincount(part, w_Q, 4) / w_Q.sum()
        tokens += np.bincount(part, minlength=4) / len(part)
        log.step(n + 1)
    log.close()
    lm.model.set_attn_implementation(before)
    return {
        p: (float(a), float(t))
        for p, a, t in zip(parts, paid / len(samples), tokens / len(samples))
    }


def probe(run, data, n, C, ranks, out):
    """Print and write probe.json and probe.png: what the soft prompt of a run learnt."""
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
    r, _ = open_run(run, data, ranks.device)
    P = r.P.detach().float()
    made = (
        run
        if run.stage == "distill"
        else load_run(run.soft_prompt)
        if run.soft_prompt != "random"
        else run
    )
    fresh = random_soft_prompt(r.lm, len(P), made.seed)
    val = subset(len(data.val), n, 0)
    samples, cand = np.asarray(data.val)[val], candidates(data, "val", C, val)
    user = users(data, samples)
    teacher = np.asarray(read_npy(backbone.folder / f"scores_val_{C}.npy", (len(data.val), C)))[val]

    # the causal test, on validation: the test part is not for looking around
    scores, tau, same = {}, {}, {}
    for name, P_kD in (("trained", P), ("untrained", fresh), ("none", None)):
        other = make_ranker(r.lm, data, run.settings, P_kD)
        scores[name] = score_samples(other, "val", val, C, ranks, name=f"{name} prompt")
        tau[name], same[name] = kendall(scores[name], teacher), agreement(scores[name], teacher)
    if not ranks.main:
        return
    moved = {
        name: {
            "kendall": float(tau[name].mean()),
            "kendall_interval": list(map(float, interval(tau[name], user))),
            "same_first": float(same[name].mean()),
            "same_first_interval": list(map(float, interval(same[name], user))),
        }
        for name in scores
    }
    tests = {
        other: {
            "kendall": float((tau["trained"] - tau[other]).mean()),
            "p_kendall": paired_t(tau["trained"], tau[other], user),
            "same_first": float((same["trained"] - same[other]).mean()),
            "p_same_first": paired_t(same["trained"], same[other], user),
        }
        for other in ("untrained", "none")
    }
    if run.settings["verbalizer"] == "likelihood" or not r.show:
        shown = np.zeros((min(len(val), 24), 0), np.int64)
    else:
        shown = np.take_along_axis(cand, listing(r, "val", C, val), 1)[:24]
    near, seen = nearest_tokens(r.lm, P), attention_shares(r, samples[:24], shown, ranks)
    result = {
        "run": str(run.folder),
        "n": len(val),
        "candidates": C,
        "k": len(P),
        "towards_the_backbone": moved,
        "tests": tests,
        "geometry": {"trained": geometry(P), "untrained": geometry(fresh)},
        "moved": float((P - fresh).norm(dim=1).mean()),
        "token_norm": float(
            r.lm.model.get_input_embeddings().weight.detach().float().norm(dim=1).mean()
        )
        * token_scale(r.lm),
        "attention": {p: {"attention": a, "tokens": t} for p, (a, t) in seen.items()},
        "nearest": near,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "probe.json", result)
    lines = [
        f"{run.folder.name}: {len(P)} vectors in front of {run.llm}; {len(val)} validation "
        f"samples, {C} candidates, backbone {backbone.folder.name}",
        "",
        f"{'soft prompt':<12}{'tau with the backbone':>34}{'same first':>30}",
    ]
    lines += [
        f"{name:<12}{m['kendall']:>12.3f} [{m['kendall_interval'][0]:.3f}, "
        f"{m['kendall_interval'][1]:.3f}]{'':>4}{m['same_first']:>10.3f} "
        f"[{m['same_first_interval'][0]:.3f}, {m['same_first_interval'][1]:.3f}]"
        for name, m in moved.items()
    ]
    lines += [
        f"trained - {other}: tau {t['kendall']:+.3f} {report.p_text(t['p_kendall'])}, same first "
        f"{t['same_first']:+.3f} {report.p_text(t['p_same_first'])} (paired t, users as "
        "clusters)"
        for other, t in tests.items()
    ]
    g, f = result["geometry"]["trained"], result["geometry"]["untrained"]
    lines += [
        "",
        f"norm of a vector {g['norm']:.2f} (untrained {f['norm']:.2f}, tokens "
        f"{result['token_norm']:.2f}); distance moved {result['moved']:.2f}; mutual cosine "
        f"{g['cosine']:.3f} "
        f"(untrained {f['cosine']:.3f}), largest {g['cosine_max']:.3f}",
        "",
        f"attention from where the LM is read, over all layers and heads, {min(len(val), 24)} "
        "prompts (share of the tokens)",
    ]
    lines += [f"  {p:<14}{a:.3f} ({t:.3f})" for p, (a, t) in seen.items()]
    lines += ["", "nearest tokens of the vectors (cosine)"] + [
        f"  {i:3} " + "  ".join(f"{t!r} {c:.2f}" for t, c in row[:3])
        for i, row in enumerate(near[:12])
    ]
    lines += [f"  .. {len(near) - 12} more in probe.json"] if len(near) > 12 else []
    print("\n" + "\n".join(lines) + "\n")
    picture(result).savefig(out / "probe.png", dpi=130)
    print(f"written: {out / 'probe.json'}, probe.png")
    print(
        json.dumps(
            {
                "stage": "probe",
                "out": str(out),
                "n": len(val),
                **{f"kendall_{name}": round(m["kendall"], 4) for name, m in moved.items()},
                **{f"same_first_{name}": round(m["same_first"], 4) for name, m in moved.items()},
            }
        )
    )


def picture(result):
    """Nearness to the backbone with each prompt, and where the attention goes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    names = list(result["towards_the_backbone"])
    for at, key, colour in ((-0.15, "kendall", report.BLUE), (0.15, "same_first", report.ORANGE)):
        mean = np.array([result["towards_the_backbone"][n][key] for n in names])
        ends = np.array([result["towards_the_backbone"][n][f"{key}_interval"] for n in names])
        left.errorbar(
            np.arange(len(names)) + at,
            mean,
            yerr=np.maximum(np.abs(ends.T - mean), 0),
            fmt="o",
            capsize=3,
            color=colour,
            label={"kendall": "Kendall's tau", "same_first": "same first place"}[key],
        )
    left.set_xticks(
        range(len(names)), [f"{n} prompt" if n != "none" else "no prompt" for n in names]
    )
    left.set_title(f"nearness to the backbone, n = {result['n']}", fontsize="medium")
    left.legend(fontsize="small")
    left.grid(axis="y", alpha=0.3)
    parts = list(result["attention"])
    for at, key, colour in ((-0.2, "attention", report.BLUE), (0.2, "tokens", report.GREY)):
        right.bar(
            np.arange(len(parts)) + at,
            [result["attention"][p][key] for p in parts],
            0.4,
            color=colour,
            label=f"share of the {key}",
        )
    right.set_xticks(range(len(parts)), parts, fontsize="small")
    right.set_title("attention from where the LM is read", fontsize="medium")
    right.legend(fontsize="small")
    return fig
