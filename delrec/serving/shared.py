"""A run that somebody shared: fetched from the Hugging Face Hub, or a folder without its data.

What a shared folder says is somebody else's word. Nothing in it is unpickled or run, and no path of
its files is followed: its backbone and its own LM stand inside it, the base LM is an id, or named
by whoever loads it.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from delrec import runtime
from delrec.backbone.models import ALL, build
from delrec.data.prepared import Data, folder_of_data, load_data, load_data_of
from delrec.data.shared import ITEMS, data_of_items
from delrec.files import first_line
from delrec.lm.model import located
from delrec.lm.pretrained import EMBEDDED, seed_and_name
from delrec.no_run import must_open
from delrec.places import BACKBONE, root_of
from delrec.runtime import (
    Run,
    beside,
    folder_of,
    is_another_meant,
    is_run,
    load_run,
    read_json,
    stop,
)

FETCHED = ["*.safetensors", "*.json", "README.md"]  # what is fetched of a shared run
ABOUT = ["config.json", ITEMS]  # of it, what says that it is one
STAGES = ["train_backbone", "distill", "finetune", "lm"]
MOST = 4096  # width, and items of a history, of a shared backbone
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name


def opened(
    name: Path | str, dataset: str | None = None, llm: str | None = None
) -> tuple[Run, Data]:
    """(a run, its data) of a folder, a name under runs/, or the Hub's id of a shared run. Where its
    prepared data are not here and it was shared (evaluate.py --card), what items.json knows.

    dataset: the prepared data; llm: the LM it was trained on. Both, where they are not where the
    run says.
    """
    of_hub = is_hub_id(name)
    run = load_run(fetched(str(name)) if of_hub else name)
    must_open(run)
    is_shared = (run.folder / ITEMS).is_file()
    if dataset:
        data = load_data(dataset)
    elif is_shared:
        place = None if of_hub or leads_away(run) else folder_of_data(run)
        data = load_data(str(place)) if place else data_of_items(run)
    else:
        data = load_data_of(run)
    load_run(run.folder, data)  # of another data set: refused
    if is_shared and (of_hub or data.shared is not None or not is_at_home(run)):
        return of_its_folder(run, data, llm), data
    if is_shared:
        with in_one_sentence(run):
            stop_unless_fitting(run, data)
    if llm:
        run.llm = located(llm)
    return run, data


def leads_away(run: Run) -> bool:
    """Does a shared run name its data by a path out of the folder of runs and data? Only one that
    stands where it was made may.
    """
    config = read_json(run.folder / "config.json")
    named = [Path(str(config.get(key) or "")) for key in ("data_folder", "dataset")]
    away = any(place.is_absolute() or ".." in place.parts for place in named)
    return away and not stands_where_made(run)


def stands_where_made(run: Run) -> bool:
    """Does a run's folder stand where its configuration says that it was made?"""
    out = read_json(run.folder / "config.json").get("out")
    place = root_of(run.folder, runtime.ROOT) / str(out)
    return bool(out) and place.resolve() == run.folder.resolve()


def is_at_home(run: Run) -> bool:
    """Does a run stand where it was made, and are the parts that a card put into its folder where
    its configuration says, too?
    """
    backbone, lm = getattr(run, "backbone_run", None), str(getattr(run, "llm", ""))
    own_lm = run.folder / "lm"
    return (
        stands_where_made(run)
        and (not is_run(run.folder / BACKBONE) or bool(backbone and is_run(backbone)))
        and (not own_lm.is_dir() or Path(lm).resolve() == own_lm.resolve())
    )


# ---------------------------------------------------------------- the Hub


def is_hub_id(name: Path | str) -> bool:
    """True for owner/name, where no run of that name stands here."""
    if not isinstance(name, str) or not HUB_ID.fullmatch(name) or name.startswith("runs/"):
        return False
    folder = folder_of("runs", name)
    return not folder.exists() and not beside(folder, "unfinished").exists()


def fetched(name: str) -> Path:
    """The folder of a shared run, fetched from the Hugging Face Hub: safetensors, JSON, README.
    What says that it is one comes first: nothing is fetched of another model.
    """
    folder = snapshot(name, ABOUT)
    if not is_run(folder):
        stop(f"{name} is no run shared by evaluate.py --card (no config.json of one); name another")
    if not (folder / ITEMS).is_file():
        stop(f"{name} is no run shared by evaluate.py --card (it lacks {ITEMS}); name another one")
    return snapshot(name, FETCHED, folder.name)


def snapshot(name: str, patterns: list[str], revision: str | None = None) -> Path:
    """The folder of what the Hub has of some files. revision: the commit; None: the newest."""
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
        )
    except Exception as bad:  # of whatever kind: of the network, the Hub, its library
        stop(
            f"{name} is no run here ({folder_of('runs', name)}){is_another_meant(name)} and was "
            f"not fetched from the Hugging Face Hub ({first_line(bad)}); name a finished run, "
            "or go online"
        )


# ---------------------------------------------------------------- what a shared run may be


def of_its_folder(run: Run, data: Data, named: str | None) -> Run:
    """The run with the places that answering reads: all in its own folder, but the base LM. What
    our scripts do not write so is refused. named: the LM that whoever loads it names.
    """
    backbone = str(run.folder / BACKBONE)
    run.data_folder, run.backbone_run = str(run.folder), backbone
    with in_one_sentence(run):
        stop_unless_fitting(run, data)
        if run.stage != "train_backbone":
            run.settings = run.settings | {"backbone_run": backbone}
            run.llm = located(named) if named else lm_of(run)
    return run


@contextlib.contextmanager
def in_one_sentence(run: Run) -> Iterator[None]:
    """While a run is opened: whatever is wrong with the files of a shared one is one sentence."""
    try:
        yield
    except click.ClickException:
        raise
    except Exception as bad:  # of whatever kind: the files are somebody else's
        if not (run.folder / ITEMS).is_file():
            raise
        stop(
            f"the shared run in {run.folder} cannot be opened ({first_line(bad)}); fetch it again, "
            "or ask whoever shared it"
        )


def lm_of(run: Run) -> str:
    """The LM that a shared run says it was trained on: its own folder lm/, or an id."""
    own = run.folder / "lm"
    if own.is_dir():
        stop_unless_safetensors(own)
        return str(own)
    name = read_json(run.folder / "config.json").get("llm")
    plain = seed_and_name(name)[1] if isinstance(name, str) else ""
    if plain == EMBEDDED or (HUB_ID.fullmatch(plain) and not plain.startswith("runs/")):
        return name
    stop(
        f"{run.folder} was trained on an LM in a folder of whoever shared it ({name!r:.80}); name "
        "the same one: Recommender.load(.., llm=FOLDER)"
    )


def stop_unless_safetensors(folder: Path) -> None:
    """Stops unless the weights of an LM's folder are safetensors of that folder."""
    if not any(folder.glob("*.safetensors")):
        stop(f"{folder} holds no weights as safetensors, and no other kind is read; fetch it again")
    for path in folder.glob("*.index.json"):
        parts = mapping(read_json(path), "weight_map").values()
        if not all(isinstance(p, str) and p == Path(p).name for p in parts):
            stop(f"{path} names weights outside of {folder}, which are not read; fetch it again")


def mapping(record: Any, key: str) -> dict:
    """The dict under a key of somebody's JSON; an empty one where there is none."""
    found = record.get(key) if isinstance(record, dict) else None
    return found if isinstance(found, dict) else {}


def stop_unless_fitting(run: Run, data: Data) -> None:
    """Stops at a shared run whose parts are not what our scripts write, before they are loaded."""
    load_run(run.folder, data, STAGES)
    adapter = run.folder / "adapter" / "adapter_config.json"
    if adapter.exists() and (kind := read_json(adapter).get("peft_type")) != "ADALORA":
        stop(f"{adapter} is of an adapter {kind!r:.40}, expected ADALORA; fetch the run again")
    if run.stage == "train_backbone":
        stop_unless_shaped(run, data)
    elif is_run(run.folder / BACKBONE):
        stop_unless_shaped(load_run(run.folder / BACKBONE, data, ["train_backbone"]), data)


def stop_unless_shaped(run: Run, data: Data) -> None:
    """Stops unless a shared backbone's weights have the shapes that its configuration says, for as
    many items as there are titles; nothing is allocated to know that.
    """
    if run.model not in ALL or run.n_items != data.n_items:
        stop(
            f"{run.folder} is a {run.model!r:.40} of {run.n_items!r:.40} items, expected one of "
            f"{', '.join(ALL)} of {data.n_items}; fetch it again"
        )
    if not all(type(n) is int and 0 < n <= MOST for n in (run.width, run.history)):
        stop(
            f"{run.folder}/config.json has the width {run.width!r:.40} and the history "
            f"{run.history!r:.40}, expected whole numbers up to {MOST}; fetch it again"
        )
    with torch.device("meta"):
        model = build(run.model, run.n_items, run)
    wanted = {name: list(p.shape) for name, p in model.named_parameters()}
    found = shapes_in(run.folder / "model.safetensors")
    if found != wanted:
        name = next(k for k in {**wanted, **found} if wanted.get(k) != found.get(k))
        stop(
            f"{run.folder}/model.safetensors holds {name:.80} of the shape {found.get(name)}, its "
            f"configuration says {wanted.get(name)}; fetch it again"
        )


def shapes_in(path: Path) -> dict[str, list[int]]:
    """The shapes of a safetensors file's tensors; none of them is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as bad:
        stop(f"{path} cannot be read as safetensors ({first_line(bad)}); fetch it again")
