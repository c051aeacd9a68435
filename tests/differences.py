"""Two folders that runs have written, compared file by file, bit for bit, without what the clock,
the memory and the place say.
"""

import contextlib
import json
import re

STOPPED_LINES = ("continuing from step", "stopped as asked", "went on from")
CLOCK_KEYS = re.compile(
    r"(^|_)(time|times|seconds|started|finished|ms|peak_gb|samples_per_second|lm_share|commit|"
    r"commits|latency|trained|date)$|per_second|per_history|machine|^one_core|finished"
)
NUMBER = r"-?\d[\d,]*(\.\d+)?(e-?\d+)?"
CLOCK_WORDS = re.compile(
    rf"({NUMBER} ?(s|ms|seconds?|minutes?|hours?|min|GB|MB|h|[a-z]+/s|a second)\b"
    rf"|{NUMBER} % of the time|\d\d:\d\d(:\d\d)?|\d{{4}}-\d\d-\d\d"
    rf"|&quot;\w*(second|_ms|_gb|_share|commit|started|finished|trained)\w*&quot;: .*"
    r"|data:image/svg\+xml;base64,[^\"]*)"  # holds a date; the same figures are compared as png
)


def without_clock(value, places):
    """A JSON value without what the clock, the memory and the place say."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not CLOCK_KEYS.search(k)}
        if isinstance(modules := kept.get("target_modules"), list):
            kept["target_modules"] = sorted(modules)  # a set, which peft writes in any order
        return {k: without_clock(v, places) for k, v in kept.items()}
    if isinstance(value, list):
        return [without_clock(v, places) for v in value]
    return text_without_clock(value, places) if isinstance(value, str) else value


def text_without_clock(text, places):
    """A text without paths of a tree and without times, rates and memory. A path inside a tree is
    the same as the one relative to it, which configurations keep."""
    for place in places:
        text = text.replace(f"{place}/", "").replace(str(place), "<here>")
    return CLOCK_WORDS.sub("<clock>", text)


def comparable(path, places):
    """A file's content as something that can be compared: a dict of parts, or a list of lines."""
    import numpy as np
    from safetensors.numpy import load_file

    if path.suffix == ".npy":
        return {"array": np.load(path)}
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (TypeError, ValueError):  # bf16, which numpy does not know
            return {"bytes": path.read_bytes()}
    if path.suffix in (".png", ".bin"):
        return {"bytes": path.read_bytes()}
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return {"json": without_clock(json.loads(text), places)}
    lines = [line for line in text.splitlines() if not any(s in line for s in STOPPED_LINES)]
    return {str(n): line_without_clock(line, places) for n, line in enumerate(lines, 1)}


def line_without_clock(line, places):
    """A line of text, or a JSON object on a line of its own."""
    if line.startswith("{") and line.endswith("}"):
        with contextlib.suppress(ValueError):
            return without_clock(json.loads(line), places)
    return text_without_clock(line, places)


def same(a, b) -> bool:
    """Equal bit for bit; NaN equals NaN."""
    import numpy as np

    if not isinstance(a, np.ndarray):
        return a == b or repr(a) == repr(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def first_difference(a, b) -> str | None:
    """The first part of two files that differs, in words."""
    for part in [*a, *(k for k in b if k not in a)]:
        if part not in a or part not in b:
            return f"{part} is only in {'the other' if part in b else 'the reference'}"
        if not same(a[part], b[part]):
            x, y = (str(v)[:300] for v in (a[part], b[part]))
            return f"{part}: {x} | {y}"
    return None


def compare(there, here, places) -> list:
    """(file, difference) of all files that differ."""
    found = []
    files = {p.relative_to(side) for side in (there, here) for p in side.rglob("*") if p.is_file()}
    for name in sorted(files - {f for f in files if f.parts[0] == "cache"}):
        if not (there / name).exists() or not (here / name).exists():
            where = "working tree" if (here / name).exists() else "reference"
            found.append((name, f"is only in the {where}"))
            continue
        difference = first_difference(*(comparable(side / name, places) for side in (there, here)))
        if difference:
            found.append((name, difference))
    print(f"{len(files)} files compared, {len(files) - len(found)} equal")
    return found
