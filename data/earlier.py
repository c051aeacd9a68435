"""What stands already where a preparation is to be written, and whether runs still need it."""

import os
import shlex
from pathlib import Path

from delrec import places, runtime
from delrec.data.prepared import kept_as
from delrec.runtime import read_json, stop


def stop_unless_replaceable(out: Path) -> None:
    """Stops if `out` holds what this script did not write."""
    if not out.exists() or (out / "meta.json").exists():
        return
    if not out.is_dir() or any(out.iterdir()):
        stop(
            f"{out} exists and is no prepared folder (it has no meta.json), so it is not replaced; "
            "give another --out or remove it"
        )


def place_of_earlier(out: Path, meta: dict, differences: list[str], overwrite: bool) -> Path | None:
    """Where the preparation in `out` is kept when the new one takes its place: None if no run uses
    it, or if it is kept there already. Without `overwrite` it is not replaced.
    """
    earlier = read_json(out / "meta.json")
    old = earlier["hash"]
    runs = runs_on(old, out) if "hash" in differences else []
    keep = kept_as(out, old) if runs else None
    if not overwrite:
        differs = f"other {', '.join(differences)}"
        if "hash" in differences:
            differs = f"hash {old}, this one {meta['hash']}"
        keeps = ""
        if keep:
            keeps = f" and keeps the earlier one as {keep} for the {len(runs)} runs that use it"
        other = "--out names another folder"
        if earlier.get("split") != meta["split"]:
            named = shlex.quote(f"{out}-{meta['split']}")
            other = f"--out {named} puts this {meta['split']} split beside it"
        stop(
            f"{out} holds another preparation ({differs}); --overwrite replaces it{keeps}, {other}"
        )
    return None if keep is None or keep.exists() else keep


def runs_on(digest: str, out: Path) -> list[str]:
    """The folders of what was trained on the preparation of that hash in `out`, finished or not:
    those under the program's runs/, beside the folder that holds `out`, and in the current folder.
    """
    roots = (runtime.ROOT, Path(os.path.abspath(out)).parent.parent)
    roots += (places.current_folder(runtime.ROOT),)
    found, said = set(), f'"data_hash": "{digest}"'
    for runs in {(root / "runs").resolve() for root in roots}:
        for folder, _, names in os.walk(runs, followlinks=True):
            for name in {"config.json", "started.json", "meta.json"} & set(names):
                if said in (Path(folder) / name).read_text(encoding="utf-8", errors="replace"):
                    found.add(folder)
    return sorted(found)
