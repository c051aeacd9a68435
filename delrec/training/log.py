"""The log of a run: one line a step in log.jsonl, and progress with time left on screen."""

import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from delrec.files import write_text
from delrec.processes import Ranks


def entries_of(folder: Path) -> list[dict]:
    """The lines of a finished run's log.jsonl."""
    return [json.loads(x) for x in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def cut_log(out: Path, name: str, step: int, ranks: Ranks) -> None:
    """Takes the lines after `step` out of log.jsonl: a resumed run writes them again. Killed here,
    the log is the one of before."""
    path = out / "log.jsonl"
    if ranks.main and path.exists():
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                # the line in writing when the run was killed
                continue
            if entry.get("name") != name or entry["step"] <= step:
                lines.append(line)
        write_text(path, "".join(f"{line}\n" for line in lines))


class Log:
    """One line per step to log.jsonl, and on screen a progress bar with time left (a line now and
    then where there is no terminal).
    """

    def __init__(
        self,
        out: Path | None,
        total: int,
        name: str,
        ranks: Ranks,
        unit: str = "step",
        done: int = 0,
    ):
        self.main, self.name = ranks.main, name
        self.total, self.first = total, done
        self.start = self.said = time.time()
        self.file = None
        if self.main and out:  # held open as long as the log is
            self.file = open(out / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit=unit,
            disable=None if self.main else True,
            dynamic_ncols=True,
            leave=False,
        )

    def step(self, done: int, **fields: Any) -> None:
        """Shows that `done` steps are done, and writes a line where there are fields."""
        if not self.main:
            return
        if self.file and fields:
            self.file.write(
                json.dumps(
                    {
                        "name": self.name,
                        "step": done,
                        "time": round(time.time() - self.start, 2),
                        **fields,
                    }
                )
                + "\n"
            )
            self.file.flush()
        text = " ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items()
        )
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.bar.n)
        if self.bar.disable and (time.time() - self.said > 15 or done == self.total):
            spent = time.time() - self.start
            left = (
                f"{spent / max(done - self.first, 1) * (self.total - done):.0f} s left"
                if done < self.total
                else f"{spent:.0f} s"
            )
            print(f"{self.name} {done}/{self.total} | {text} | {left}", flush=True)
            self.said = time.time()
        if self.bar.disable:
            self.bar.n = done

    def close(self) -> None:
        """Ends the progress bar and the file."""
        self.bar.close()
        if self.file:
            self.file.close()
