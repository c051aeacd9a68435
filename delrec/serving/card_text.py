"""README.md of a run that is shared: a model card as the Hugging Face Hub reads it."""

import json
from pathlib import Path

import numpy as np

from delrec.data.prepared import Data
from delrec.data.terms import UNKNOWN, terms_of
from delrec.lm.pretrained import EMBEDDED, seed_and_name
from delrec.metrics import chance
from delrec.names import NAMES
from delrec.runtime import Run, read_json
from delrec.serving.commands import commands, lm_name, name_of, sources_of_text

KINDS = {"distill": "a soft prompt for", "finetune": "a fine-tuned", "lm": "a plain"}
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the embedded LM on the Hub
SHOWN = ("hr@1", "hr@5", "hr@10", "ndcg@10", "mrr")
FULL = ("hr@10", "ndcg@10", "hr@20", "ndcg@20")


def card_text(run: Run, data: Data, table: Path) -> str:
    """The card. table: the folder of the table that it shows."""
    parts = [
        *head(run, data),
        "",
        f"# {name_of(run.folder)}: {what_it_is(run)} on {data.name}",
        "",
        *warning(data),
        "Written by `evaluate.py --card` of delrec. It ranks the next item after a history of "
        f"{data.meta['words']['noun']}s.",
        "",
        "## How to use it",
        "",
        *use(run, data),
        "",
        "## Data",
        "",
        *about_data(data),
        "",
        "## Metrics",
        "",
        *metrics(run, data, table),
        "",
        "## Commands that made it",
        "",
        "```",
        *commands(run, data),
        "```",
        "",
        "## Licences",
        "",
        *licences(run, data),
    ]
    return "\n".join(parts) + "\n"


def what_it_is(run: Run) -> str:
    """The kind of a run in words."""
    if run.stage == "train_backbone":
        return NAMES.get(run.model, run.model)
    return f"{KINDS[run.stage]} {lm_name(run).removeprefix('path/to/')}"


def base_model(run: Run) -> str | None:
    """The Hub's id of the LM that a run began with; None where it is none of the Hub."""
    if run.stage == "train_backbone":
        return None
    seed, name = seed_and_name(lm_name(run))
    if seed is not None or name.startswith("path/"):
        return None
    return BASE if name == EMBEDDED else name


# ---------------------------------------------------------------- the parts


def head(run: Run, data: Data) -> list[str]:
    """The yaml that the Hub reads."""
    is_lm = run.stage != "train_backbone"
    tags = ["delrec", "recommendation", "sequential-recommendation"]
    tags += ["language-model"] if is_lm else [run.model]
    lines = ["---", "library_name: delrec", "tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    if base := base_model(run):
        lines.append(f"base_model: {json.dumps(base)}")
    if terms_of(data.meta).forbidden:
        lines += ["license: other", "license_name: no-redistribution-without-permission"]
    else:
        lines.append("license: unknown")
    return [*lines, "---"]


def warning(data: Data) -> list[str]:
    """What has to be read first, where the data may not be shared."""
    terms = terms_of(data.meta)
    if not terms.forbidden:
        return []
    return [
        "> **WARNING: not to be redistributed without permission.** The titles and ids in "
        f"`items.json` are of {data.name}, whose terms forbid that ({terms.said}). Do not make "
        "this folder public unless you have the permission.",
        "",
    ]


def use(run: Run, data: Data) -> list[str]:
    """Five lines that ask for items."""
    taken = np.argsort(-np.bincount(data.items), kind="stable")[:2].tolist()
    titles = json.dumps([data.titles[item] for item in taken], ensure_ascii=False)
    named = ""
    if run.stage != "train_backbone" and "path/to/" in lm_name(run):
        named = f", llm={json.dumps(lm_name(run))}"
    lines = [
        "```python",
        "from delrec import Recommender",
        "",
        f'rec = Recommender.load("OWNER/NAME"{named})  # or this folder',
        f"for item in rec.recommend({titles}, top=5).items:",
        "    print(item.id, item.title, item.score)",
        "```",
        "",
        "Answers need titles or ids; no user is known here. The files are safetensors and JSON.",
    ]
    if run.stage != "train_backbone" and not (run.folder / "lm").is_dir():
        lines.append(
            f"The base LM, {lm_name(run)}, is not in this folder; its fingerprint "
            f"({getattr(run, 'llm_fingerprint', 'unknown')}) is checked when it is loaded."
        )
    return lines


def about_data(data: Data) -> list[str]:
    """What the run was trained on, in numbers."""
    meta = data.meta
    rows = [
        ("name", data.name),
        ("source", meta.get("source", "unknown")),
        ("users, items, interactions", f"{data.n_users:,}, {data.n_items:,}, {len(data.items):,}"),
        ("least interactions of a user and an item", meta.get("core", "unknown")),
        ("split", meta["split"]),
        (
            "samples: train, val, test",
            f"{len(data.train):,}, {len(data.val):,}, {len(data.test):,}",
        ),
        ("hash of the preparation", meta["hash"]),
        ("terms", terms_of(meta).said),
    ]
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def licences(run: Run, data: Data) -> list[str]:
    """Who may use what, as far as it is known."""
    lines = [f"- Data, so also `items.json`: {terms_of(data.meta).said}."]
    if run.stage != "train_backbone":
        is_embedded = base_model(run) == BASE
        said = "Apache-2.0" if is_embedded else UNKNOWN
        inside = "; `lm/` holds weights made of it" if (run.folder / "lm").is_dir() else ""
        lines.append(f"- Language model {lm_name(run)}: {said}{inside}.")
    if "minilm" in sources_of_text(run):
        lines.append(
            "- all-MiniLM-L6-v2, whose vectors of titles are in the item vectors: Apache-2.0."
        )
    return [*lines, f"- These weights: {UNKNOWN}.", "- The program delrec: Apache-2.0."]


# ---------------------------------------------------------------- metrics


def metrics(run: Run, data: Data, table: Path) -> list[str]:
    """The metrics of a run's last table, else of its own metrics.json, with their protocol."""
    path = table / "metrics.json"
    result = read_json(path) if path.exists() else {}
    name = row_of(run, result.get("rows", {}))
    if result.get("hash") == data.meta["hash"] and name:
        return metrics_of_table(result, name)
    own = run.folder / "metrics.json"
    found = read_json(own).get("test") if own.exists() and run.stage == "train_backbone" else None
    if found:
        return own_metrics(read_json(own)["protocol"], found)
    return [f"Not measured yet: `python evaluate.py --ckpt {name_of(run.folder)}`, then --card."]


def row_of(run: Run, rows: dict) -> str | None:
    """The name of a run's row in a table, which may begin with parents of its folder; None where it
    has none, or two runs may be meant.
    """
    alike = [name for name in rows if Path(name).name == run.folder.name]
    own = [name for name in alike if f"/{run.folder}".endswith(f"/{name}")]
    longest = max(own, key=len, default=None)
    return longest if longest != run.folder.name or len(alike) == 1 else None


def metrics_of_table(result: dict, own: str) -> list[str]:
    """The rows of a table that tell what a run is worth: chance, popularity, what the run was
    tested against, and itself.
    """
    names = ("chance", "popularity", result["reference"], own)
    names = [name for name in dict.fromkeys(names) if name in result["rows"]]
    lines = [
        f"{result['protocol']}. Chance level: HR@1 {result['chance']['hr@1']:.3f}, NDCG@10 "
        f"{result['chance']['ndcg@10']:.3f}.",
        "",
        *table_head(SHOWN),
    ]
    for name in names:
        row = result["rows"][name]
        lines.append(table_row(label(name, own), [cell(row, m) for m in SHOWN]))
    full = {name: result["full"][name] for name in names if name in result.get("full", {})}
    if own in full:
        lines += ["", f"Over all {result['items']} items, history left out:", ""]
        lines += table_head(FULL)
        for name, row in full.items():
            lines.append(table_row(label(name, own), [f"{row[m]:.4f}" for m in FULL]))
    return lines


def label(name: str, own: str) -> str:
    """A row's name; the run's own is bold."""
    return f"**{Path(name).name}**" if name == own else Path(name).name


def cell(row: dict, metric: str) -> str:
    """A metric, with its interval where there is one."""
    ends = row.get(f"{metric}_interval")
    if not ends or ends[0] is None:  # one user has no interval
        return f"{row[metric]:.3f}"
    return f"{row[metric]:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"


def own_metrics(protocol: str, test: dict) -> list[str]:
    """What a backbone measured when it was trained, on the test part."""
    lines = [
        f"Test part; {protocol}. Without intervals: `evaluate.py --ckpt`, then --card, adds them.",
        "",
        *table_head(SHOWN),
    ]
    for name, row in test.items():
        among = name.removeprefix("candidates")
        if among.isdigit():
            level = chance(int(among))
            lines.append(table_row(f"chance of {among}", [f"{level[m]:.3f}" for m in SHOWN]))
            lines.append(table_row(f"among {among}", [f"{row[m]:.3f}" for m in SHOWN]))
        else:
            lines.append(table_row("over all items", [f"{row[m]:.4f}" for m in SHOWN]))
    return lines


def table_head(shown: tuple[str, ...]) -> list[str]:
    """The first two lines of a table of metrics."""
    return [table_row("", [m.upper() for m in shown]), "|---" * (len(shown) + 1) + "|"]


def table_row(name: str, cells: list[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join([name, *cells])} |"
