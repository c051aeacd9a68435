"""The headline's ensembles: what is fused of which rows, and what each is compared with.

Models fused are often better than each of them, whatever they are. So what holds an LM is compared
with as many members without one: a SASRec in each DELRec's place, a GRU4Rec, or a SASRec with
titles in its item vectors, which with both counts is the strongest single model without an LM on
beauty.
"""

from recipes.runs import Plan

COUNTS = ("co-occurrence", "title-similarity")  # floors that tell a model more, each fused in turn
BOTH = "+".join(COUNTS)


def with_both_counts(row: str) -> list[tuple[str, str]]:
    """The pairs to fuse so that a row has both counts."""
    first, second = COUNTS
    return [(row, first), (f"{row}+{first}", second)]


def fusions(plan: Plan) -> list[str]:
    """The flags of evaluate.py that fuse headline's rows."""
    pairs = []
    for s in range(plan.backbone_seeds):
        pairs.append((f"sasrec-s{s}", f"gru4rec-s{s}"))
        pairs.append((f"sasrec-s{s}+gru4rec-s{s}", "co-occurrence"))
        pairs += [(f"{model}-s{s}", "co-occurrence") for model in ("sasrec", "gru4rec")]
        pairs += with_both_counts(f"sasrec-titles-s{s}")
    for s in range(plan.seeds):
        pairs += [(f"{model}-s{s}", "co-occurrence") for model in ("delrec", "no-prompt")]
        pairs.append((f"delrec-s{s}+co-occurrence", "title-similarity"))
    if plan.seeds > 1:  # two of a kind; then with more
        pairs.append(("sasrec-titles-s0", "sasrec-titles-s1"))
        pairs += with_both_counts("sasrec-titles-s0+sasrec-titles-s1")
        two = {m: f"{m}-s0+{m}-s1" for m in ("delrec", "sasrec", "gru4rec")}
        pairs += [(f"{model}-s0", f"{model}-s1") for model in two]
        for model in ("delrec", "sasrec"):
            pairs.append((two[model], "co-occurrence"))
            pairs.append((f"{two[model]}+co-occurrence", "gru4rec-s0"))
            pairs.append((two[model], two["gru4rec"]))
            pairs.append((f"{two[model]}+{two['gru4rec']}", "co-occurrence"))
        pairs.append((f"{two['delrec']}+co-occurrence", "title-similarity"))
    return [flag for pair in pairs for flag in ("--fuse", *pair)]


def controls(plan: Plan) -> list[str]:
    """The flags of evaluate.py that compare DELRec with what has as many members and no LM, and
    with itself without stage 1.
    """
    counts = "co-occurrence"
    pairs = [("delrec", "gru4rec"), ("delrec", "no-prompt"), ("sasrec+delrec", "sasrec+gru4rec")]
    pairs += [(f"delrec+{counts}", f"{model}+{counts}") for model in ("sasrec", "gru4rec")]
    pairs += [("delrec", "sasrec-titles"), (f"delrec+{BOTH}", f"sasrec-titles+{BOTH}")]
    if plan.seeds > 1:
        pairs.append((f"delrec+delrec+{BOTH}", f"sasrec-titles+sasrec-titles+{BOTH}"))
        pairs += [("delrec+delrec", f"{model}+{model}") for model in ("sasrec", "gru4rec")]
        more = ["gru4rec+gru4rec", f"gru4rec+gru4rec+{counts}", counts, f"{counts}+gru4rec"]
        pairs += [(f"delrec+delrec+{end}", f"sasrec+sasrec+{end}") for end in more]
        pairs.append((f"delrec+delrec+{counts}", f"sasrec+gru4rec+{counts}"))
    return [flag for pair in pairs for flag in ("--compare", *pair)]
