"""What the papers of the methods in a table print themselves (data/papers.csv)."""

import csv

from delrec.evaluation.wording import short
from recipes.backbones_table import PUBLISHED

METRICS = ("hr@1", "hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20")


def printed_lines(rows: list[str]) -> list[str]:
    """A line for each figure that the paper of one of the rows prints, by a protocol of its own."""
    lines, found = [], set()
    with open(PUBLISHED, encoding="utf-8") as f:
        for x in csv.DictReader(f):
            if x["row"] in rows and x["split"] != "leave-one-out":
                figures = ", ".join(f"{m.upper()} {short(float(x[m]), 4)}" for m in METRICS if x[m])
                found.add(x["row"])
                lines.append(
                    f"published, another protocol: {x['row']} on {x['dataset']} {figures} "
                    f"({x['source']}; {x['protocol']})"
                )
    if missing := [row for row in rows if row not in found]:
        lines.append(f"no figure of their own papers is kept here: {', '.join(missing)}")
    return lines
