"""The export of an LM's run (evaluate.py --export), as a backbone finds it: whole, and of the run
as it is.
"""

from pathlib import Path

from delrec.runtime import Run, beside, complete_renames, read_json, stop


def export_folder(run: Run, name: str) -> Path:
    """The folder of a complete export that was made of the run as it is."""
    folder = run.folder / "export"
    complete_renames(folder, "meta.json")
    if not (folder / "meta.json").exists():
        begun = "complete " if beside(folder, "unfinished").exists() else ""
        stop(
            f"{run.folder} holds no {begun}export; make it with: python evaluate.py --ckpt {name} "
            "--export"
        )
    meta = read_json(folder / "meta.json")
    trained = (getattr(run, "seconds", 0), getattr(run, "best_step", 0))
    if (meta.get("trained"), meta.get("best_step")) != trained:
        stop(
            f"{folder} was made from an earlier training of {run.folder}; make it again with: "
            f"python evaluate.py --ckpt {name} --export --overwrite"
        )
    return folder
