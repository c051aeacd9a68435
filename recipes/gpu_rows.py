"""The rows of make gpu: their names, units and goals, and the file that each is written to at once.

Only python's own modules are used here: a bare machine may lack all others. A name holds the shape
that is measured on a card; the rehearsal measures a tiny one under the same name, and its rows say
so (`card`).
"""

import datetime
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

GATHERS = {  # label: (B, C, T, D, V)
    "16x15x12x2048": (16, 15, 12, 2048, 32128),
    "64x20x12x2048": (64, 20, 12, 2048, 32128),
    "256x20x16x2048": (256, 20, 16, 2048, 32128),
    "64x20x12x576": (64, 20, 12, 576, 49152),
    "64x20x12x4096": (64, 20, 12, 4096, 128256),
}
RIVALS = ("full_logits", "eager_gather", "embedding_bag", "compiled_bag")
LIKELIHOODS = {  # label: (rows, D, V)
    "64x49152": (64, 576, 49152),
    "64x32128": (64, 2048, 32128),
    "256x49152": (256, 576, 49152),
    "256x32128": (256, 2048, 32128),
    "2000x49152": (2000, 576, 49152),
    "2000x32128": (2000, 2048, 32128),
    "2000x128256": (2000, 4096, 128256),
}
CATALOGUES = (10_000, 100_000, 1_300_000)
BATCHES = (1, 8, 32, 128)
FLAN = "flan-t5-xl"
LMS = (FLAN, "llama-8b")
VARIED = ("smollm2-135m", *LMS)  # in this order: what costs least comes first
VARIANTS = ("mask", "causal", "compiled", "flex", "nested", "fp8")
BACKENDS = ("math", "efficient", "flash", "cudnn")
Names = dict[str, tuple[str, float | None]]  # {row: (unit, goal)}


# ---------------------------------------------------------------- what is measured


def checks() -> Names:
    """Rows of stage checks: what must be right before anything is fast."""
    return {
        "checks.kernels.passed": ("tests", None),
        "checks.kernels.failed": ("tests", 0),
        "checks.resume.same_bits": ("1 or 0", 1),
        "checks.two_cards.same_bits": ("1 or 0", 1),
    }


def kernels() -> Names:
    """Rows of stage kernels: the verbalizer against the card's own bandwidth, and torch."""
    rows = {
        "rates.copy": ("GB/s", None),
        "rates.matmul.bf16": ("TFLOP/s", None),
        "rates.matmul.fp8": ("TFLOP/s", None),
    }
    for label, (B, *_) in GATHERS.items():
        base, goal = f"gather.{label}", 0.85 if B >= 64 else None
        rows |= {f"{base}.us": ("us", None), f"{base}.share_of_copy": ("share", goal)}
        rows |= {f"{base}.backward_us": ("us", None)}
        rows |= {f"{base}.backward_share_of_copy": ("share", goal)}
        rows |= {f"{base}.call_us": ("us", None)}
        rows |= {f"{base}.vs_{rival}": ("x", 1) for rival in RIVALS}
    for label, (N, _, V) in LIKELIHOODS.items():
        base = f"likelihood.{label}"
        rows |= {f"{base}.ms": ("ms", None), f"{base}.time_vs_full_logits": ("x", 1)}
        # one tile of 8,192 words against twice 32,128 of them, all in fp32: .1275
        rows |= {f"{base}.memory_vs_full_logits": ("share", 0.13 if N >= 2000 else None)}
        if V <= 2**16:
            rows |= {f"{base}.forward_backward_vs_full_logits": ("x", 1)}
    for n_items in CATALOGUES:
        base = f"catalogue.{n_items}"
        rows |= {f"{base}.ms_per_user": ("ms", None), f"{base}.vs_torch": ("x", 1)}
        rows |= {f"{base}.memory_mb": ("MB", 512)}
    return rows


def lms() -> Names:
    """Rows of stage lms: large shapes with random weights, prompts of 600 tokens."""
    rows = {}
    for name in LMS:
        for n in BATCHES:
            base = f"lm.{name}.batch{n}"
            goal = (6.0 if n == 1 else 3.0 if n >= 32 else None) if name == FLAN else None
            rows |= {f"{base}.ms_per_request": ("ms", goal), f"{base}.mfu": ("share", None)}
            rows |= {f"{base}.peak_gb": ("GB", None)}
        rows |= {f"lm.{name}.vs_paper_request": ("x", None)}
        for stage in ("stage1", "stage2"):
            base = f"lm.{name}.{stage}"
            rows |= {f"{base}.samples_per_second": ("1/s", None), f"{base}.mfu": ("share", 0.4)}
            rows |= {f"{base}.peak_gb": ("GB", 24), f"{base}.micro": ("prompts a pass", None)}
            rows |= {f"{base}.computed_again": ("1 or 0", None)}
    return rows


def chain() -> Names:
    """Rows of stage chain: SmolLM2-135M on ml-100k, all stages, by the scripts themselves."""
    rows = {"chain.backbone.seconds": ("s", None)}
    for form in ("vectors", "titles"):
        base = f"chain.{form}"
        stage2 = 500 if form == "titles" else None
        catalogue = 100_000 if form == "vectors" else None
        rows |= {f"{base}.stage1.samples_per_second": ("1/s", None)}
        rows |= {f"{base}.stage2.samples_per_second": ("1/s", stage2)}
        rows |= {f"{base}.scoring.requests_per_second": ("1/s", None)}
        rows |= {f"{base}.catalogue.requests_per_second": ("1/s", catalogue)}
        rows |= {f"{base}.hr1": ("HR@1 of 15", None)}
    rows |= {"chain.backbone.hr1": ("HR@1 of 15", None)}
    ends = {f"chain.titles.minus_backbone{end}": ("HR@1", None) for end in ("", "_low", "_high")}
    return rows | ends


def variants() -> Names:
    """Rows of stage variants: ways to compute the same scores, each for itself."""
    rows = {}
    for name in VARIED:
        base = f"variant.{name}"
        names = ("mask", "compiled", "fp8") if name == FLAN else VARIANTS
        for way in (*names, *(f"sdpa_{backend}" for backend in backends_of(name))):
            goal = 1.9 if (name, way) == (FLAN, "fp8") else None
            rows |= {f"{base}.{way}.ms_per_request": ("ms", goal)}
            rows |= {f"{base}.{way}.score_change": ("of the scores' deviation", None)}
        rows |= {f"{base}.compiled.warm_up_s": ("s", None)}
        rows |= {f"{base}.{way}.ms": ("ms", None) for way in ("alone", "alone_body", "alone_graph")}
        rows |= {f"{base}.fp8.same_first": ("share", 1)}
    rows |= {f"variant.smollm2-135m.fp8.hr1{end}": ("HR@1", None) for end in ("", "_of_bf16")}
    ends = ("low", "high")
    return rows | {f"variant.smollm2-135m.fp8.hr1_change_{e}": ("HR@1", None) for e in ends}


def backends_of(name: str) -> list[str]:
    """The back ends of torch's attention that an LM is measured by: flash takes no mask, which is
    how Flan-T5's bias of places comes.
    """
    return [backend for backend in BACKENDS if (name, backend) != (FLAN, "flash")]


LEFT_OUT = "left out of the quick rehearsal"
USED_AGAIN = "a backbone of an earlier time was used"
# what a CPU cannot say: rows of a card's memory, back ends of attention that torch has for cards
ONLY_ON_A_CARD = (".peak_gb", "sdpa_efficient.", "sdpa_cudnn.", "memory_")


def unexpected(rows: list[dict]) -> list[dict]:
    """Rows of a rehearsal without a value, for which a CPU is no reason."""
    fine = (LEFT_OUT, USED_AGAIN)
    empty = [row for row in rows if row["value"] is None and row["reason"] not in fine]
    return [row for row in empty if not any(part in row["name"] for part in ONLY_ON_A_CARD)]


PLAN = {"checks": checks, "kernels": kernels, "lms": lms, "chain": chain, "variants": variants}


# ---------------------------------------------------------------- the file


class Rows:
    """A file of one JSON object a line, each written and flushed at once."""

    def __init__(self, path: Path, stage: str, card: str, commit: str | None) -> None:
        self.path, self.names = Path(path), PLAN[stage]()
        self.card, self.commit = card, commit

    def add(self, name: str, value: float | None, reason: str = "") -> None:
        """Writes a row. value: None where nothing was measured, for the reason given."""
        unit, goal = self.names[name]
        row = {"name": name, "value": value if value is None else round(float(value), 5)}
        row |= {"unit": unit, "goal": goal, "card": self.card, "commit": self.commit}
        row |= {"date": datetime.date.today().isoformat()}
        row |= {"reason": reason or "it gave no reason"} if value is None else {}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        said = f"{row['value']:>14,.4f} {unit}" if value is not None else f"  null: {row['reason']}"
        print(f"{name:<58}{said}", flush=True)

    def add_all(self, base: str, values: dict[str, float | None]) -> None:
        """Writes rows whose names begin with `base`."""
        for name, value in values.items():
            self.add(f"{base}.{name}", value)

    def missing(self, begin: str = "") -> list[str]:
        """The names of the stage, among those that begin so, that no row has yet."""
        there = {row["name"] for row in read(self.path)}
        return [name for name in self.names if name.startswith(begin) and name not in there]

    def leave(self, begin: str, reason: str) -> None:
        """Writes a row without a value for every name that begins so and has none yet."""
        for name in self.missing(begin):
            self.add(name, None, reason)

    def attempt(self, begin: str, measure: Callable, *args: Any) -> None:
        """Calls measure(*args), which writes rows whose names begin so; where it fails, those that
        it did not reach say why, and the stage goes on.
        """
        try:
            measure(*args)
        except Exception as bad:  # of whatever kind: one measurement, not the stage
            traceback.print_exc()
            said = (str(bad).strip().splitlines() or [""])[0]
            self.leave(begin, f"{type(bad).__name__}: {said}"[:200])


def read(path: Path) -> list[dict]:
    """The rows of a file; a line that a kill cut in two is left out."""
    rows = []
    if not Path(path).exists():
        return rows
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
