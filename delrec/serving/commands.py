"""The commands that made a run, from the log on, as its configuration tells them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from delrec import runtime
from delrec.backbone import titled
from delrec.backbone.models import is_ours
from delrec.backbone.text import names_of as names_of_text
from delrec.data.prepared import Data
from delrec.data.terms import TERMS
from delrec.places import RUNS, root_of
from delrec.runtime import Run, is_run, load_run, read_json, read_npy

# flags that are said also where they are off
BOTH_WAYS = {"show", "instruct", "check_llm", "cache_prefix", "offset", "calibrate"}
# what a command does not need to make the same run
UNSAID = {"dataset", "out", "resume", "overwrite", "checkpoint_every", "paper"}
UNSAID |= {"folds_digest", "summaries"}  # which are no flags
# where a run went on from one, that one's is kept
KEPT = {"soft_prompt"}
# with --input ids they are fixed
FIXED = {"distill": {"verbalizer", "show"}}
FIXED["finetune"] = FIXED["distill"] | {"order", "loss", "calibrate"}
FIXED["finetune"] |= {"hint", "orders", "pool", "draw"}


def name_of(place: Path | str) -> str:
    """A run's name: what follows `runs`, else its folder's."""
    parts = Path(place).parts
    if "runs" in parts[:-1]:
        return "/".join(parts[len(parts) - parts[::-1].index("runs") :])
    return parts[-1]


def lm_name(run: Run) -> str:
    """The LM that a run began with, as the card says it: an id, or a folder's name."""
    prefix, _, name = str(getattr(run, "llm_from", run.llm)).rpartition(":")
    name = f"path/to/{Path(name).name}" if Path(name).is_absolute() else name
    return f"{prefix}:{name}" if prefix else name


def commands(run: Run, data: Data) -> list[str]:
    """The commands that made a run, from the log on; of runs on an earlier log (--from) too."""
    found, log = [], None  # log: the hash of what the commands so far were run on
    made = list(made_by(run))
    exported = {lm for one in made if isinstance(one, Run) for lm in read_exports(one)}
    for one in made:
        its_log = getattr(one, "data_hash", run.data_hash)
        if its_log != log:
            earlier = f"# on an earlier log, whose preparation has the hash {its_log}:"
            found.append(prepare_command(data) if its_log == run.data_hash else earlier)
        log = its_log
        found.append(line_of(one))
        if isinstance(one, Run) and str(one.folder) in exported:
            found.append(export_command(one))
    found.append(["python", "evaluate.py", "--ckpt", name_of(run.folder)])
    return [line if isinstance(line, str) else wrapped(line) for line in found]


def line_of(one: Run | str) -> list[str] | str:
    """The command that made a run; of one that is gone or was made elsewhere, what it is."""
    if isinstance(one, str):
        return f"# {one} is not here any more"
    if one.stage == "train_backbone" and not is_ours(one):
        return f"# {name_of(one.folder)}: a model of your own"
    return command_of(one)


def wrapped(words: list[str]) -> str:
    """A command on lines of at most 90 characters; a flag stays with its value."""
    lines = [""]
    for part in re.split(r" (?=--)", shlex.join(words)):
        if len(lines[-1]) + len(part) > 88:
            lines.append("")
        lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n    ".join(lines)


def prepare_command(data: Data) -> list[str]:
    """The command that prepared the data."""
    meta = data.meta
    known = data.name in ("ml-100k", "ml-1m", "ml-latest-small", *TERMS)
    words = ["python", "data/prepare.py", data.name, *([] if known else ["--raw", "FOLDER"])]
    for key in ("core", "split", "seed", "max_eval"):
        if meta.get(key) is not None:
            words += [f"--{key.replace('_', '-')}", str(meta[key])]
    if not known:
        words += ["--noun", meta["words"]["noun"], "--verb", meta["words"]["verb"]]
    return words + ([] if data.folder_name == data.name else ["--out", f"data/{data.folder_name}"])


def made_by(run: Run, seen: set | None = None) -> Iterator[Run | str]:
    """Yields the runs that a run was made of, the first first, and itself; of one that is gone its
    name.
    """
    seen = set() if seen is None else seen
    seen.add(str(run.folder))
    for place in places_of(run):
        is_place = isinstance(place, str) and Path(place).is_absolute()
        is_place = is_place and not place.endswith(".npy")  # --text may name a file
        if place == str(run.folder):  # it has taken the place of the run it went on from
            yield f"{name_of(place)} of before"
        elif is_place and place not in seen:
            seen.add(place)
            yield from made_by(load_run(place), seen) if is_run(place) else [name_of(place)]
    yield run


def places_of(run: Run) -> list[str | None]:
    """What a run was made of, as it names it: whole paths of runs, words, files; None for nothing.
    Runs that answered in an export of another come before it."""
    keys = ("from_run", "backbone_run", "teacher", "soft_prompt", "maps")
    named = [getattr(run, key, None) for key in keys] + list(getattr(run, "kd", None) or ())
    asked = [one for lm in read_exports(run) for one in asked_for(Path(lm))]
    return [*asked, *named[:3], *sources_of_text(run), *named[3:]]


def sources_of_text(run: Run) -> list[str]:
    """The sources that --text of a run named, each."""
    text = getattr(run, "text", None)
    return names_of_text(text) if text else []


def read_exports(run: Run) -> list[str]:
    """The folders of the LMs whose exports a backbone was trained on (--teacher, --text)."""
    if run.stage != "train_backbone":
        return []
    named = [getattr(run, "teacher", None), *sources_of_text(run)]
    return [name for name in named if name and Path(name).is_absolute() and is_run(name)]


def asked_for(lm: Path) -> list[str]:
    """The folders of the runs that answered in an LM's export for users they had not seen."""
    return [
        str(root_of(lm, runtime.ROOT) / name) for name in export_of(lm).get("out_of_fold") or ()
    ]


def export_of(lm: Path) -> dict[str, Any]:
    """What the export of an LM's run was made of; nothing where it is not here."""
    meta = lm / "export" / "meta.json"
    return read_json(meta) if meta.exists() else {}


def export_command(run: Run) -> list[str]:
    """The command of an LM's export."""
    made, lists = export_of(run.folder), run.folder / "export" / "topk.npy"
    words = ["python", "evaluate.py", "--ckpt", name_of(run.folder), "--export"]
    words += ["--export-k", str(made["K"])] if "K" in made else []
    # a row a training sample of its own log, which may be an earlier one that is not here any more
    if "samples" in made and lists.exists() and made["samples"] < len(read_npy(lists)):
        words += ["--limit", str(made["samples"])]
    return words + [word for one in asked_for(run.folder) for word in ("--folds", name_of(one))]


def command_of(run: Run) -> list[str]:
    """The command that made a run, with every flag that shaped it."""
    config = read_json(run.folder / "config.json")
    if run.stage == "lm":
        return plain_command(run)
    keys = list(config)
    flags = {key: config[key] for key in keys[1 : keys.index("data_folder")]}
    left_out = UNSAID | (FIXED[run.stage] if flags.get("input") == "ids" else set())
    left_out = left_out | (KEPT if flags.get("from_run") else set())
    left_out = left_out | titled.UNUSED.get(flags.get("model"), set())
    words = ["python", f"{run.stage}.py", "--dataset", dataset_of(run)]
    for key, value in flags.items():
        if key not in left_out:
            words += words_of(key, said_value(run, key, value))
    return [*words, "--out", name_of(run.folder)]


def dataset_of(run: Run) -> str:
    """The name of a run's prepared folder."""
    return Path(getattr(run, "data_folder", None) or run.dataset).name


def said_value(run: Run, key: str, value: Any) -> Any:
    """A flag's value as a command says it: runs by their names."""
    if key == "llm":
        return lm_name(run)
    if key == "backbone":
        return name_of(run.backbone_run)
    if isinstance(value, list):
        return [said_value(run, key, each) for each in value]
    if not isinstance(value, str) or key not in RUNS:
        return value
    sources = names_of_text(value) if key == "text" else [value]
    return "+".join(name_of(source) if "/" in source else source for source in sources)


def words_of(key: str, value: Any) -> list[str]:
    """A flag with its value, as it is typed; nothing where it is off."""
    flag = {"C": "candidates", "from_run": "from"}.get(key, key.replace("_", "-"))
    if isinstance(value, bool):
        return [f"--{flag}"] if value else [f"--no-{flag}"] if key in BOTH_WAYS else []
    if value is None:
        return []
    some = value if isinstance(value, list) else [value]
    return [word for one in some for word in (f"--{flag}", str(one))]


def plain_command(run: Run) -> list[str]:
    """The command that made the run of a plain LM."""
    s = run.settings
    words = ["python", "evaluate.py", "--llm", lm_name(run), "--dataset", dataset_of(run)]
    words += ["--verbalizer", s["verbalizer"], "--prompt-history", str(s["history"])]
    words += [*words_of("show", s["show"]), *words_of("calibrate", run.calibrate)]
    words += ["--candidates", str(run.C), "--val-samples", str(run.val_samples)]
    return [*words, "--llm-out", name_of(run.folder)]
