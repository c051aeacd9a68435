"""The headline's ensembles: what is fused of which rows, and what each is compared with.

Models fused are often better than each of them, whatever they are. So what holds an LM is compared
with as many members without one: a SASRec in each DELRec's place, or a GRU4Rec.
"""

from recipes.runs import Plan


def fusions(plan: Plan) -> list[str]:
    """The flags of evaluate.py that fuse headline's rows."""
    pairs = []
    for s in range(plan.backbone_seeds):
        pairs.append((f"sasrec-s{s}", f"gru4rec-s{s}"))
        pairs.append((f"sasrec-s{s}+gru4rec-s{s}", "co-occurrence"))
        pairs += [(f"{model}-s{s}", "co-occurrence") for model in ("sasrec", "gru4rec")]
    for s in range(plan.seeds):
        pairs += [(f"{model}-s{s}", "co-occurrence") for model in ("delrec", "no-prompt")]
    if plan.seeds > 1:  # two of a kind; then with more
        two = {m: f"{m}-s0+{m}-s1" for m in ("delrec", "sasrec", "gru4rec")}
        pairs += [(f"{model}-s0", f"{model}-s1") for model in two]
        for model in ("delrec", "sasrec"):
            pairs.append((two[model], "co-occurrence"))
            pairs.append((f"{two[model]}+co-occurrence", "gru4rec-s0"))
            pairs.append((two[model], two["gru4rec"]))
            pairs.append((f"{two[model]}+{two['gru4rec']}", "co-occurrence"))
    return [flag for pair in pairs for flag in ("--fuse", *pair)]


def controls(plan: Plan) -> list[str]:
    """The flags of evaluate.py that compare DELRec with what has as many members and no LM, and
    with itself without stage 1.
    """
    counts = "co-occurrence"
    pairs = [("delrec", "gru4rec"), ("delrec", "no-prompt"), ("sasrec+delrec", "sasrec+gru4rec")]
    pairs += [(f"delrec+{counts}", f"{model}+{counts}") for model in ("sasrec", "gru4rec")]
    if plan.seeds > 1:
        pairs += [("delrec+delrec", f"{model}+{model}") for model in ("sasrec", "gru4rec")]
        more = ["gru4rec+gru4rec", f"gru4rec+gru4rec+{counts}", counts, f"{counts}+gru4rec"]
        pairs += [(f"delrec+delrec+{end}", f"sasrec+sasrec+{end}") for end in more]
        pairs.append((f"delrec+delrec+{counts}", f"sasrec+gru4rec+{counts}"))
    return [flag for pair in pairs for flag in ("--compare", *pair)]
