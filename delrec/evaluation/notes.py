"""What is said of a table's rows beside what was measured (evaluate.py --notes): a last column, and
lines below. For a table of methods of other papers: what differs, what those papers print.
"""

from dataclasses import dataclass, field
from pathlib import Path

from delrec.evaluation.stats import unseeded
from delrec.runtime import read_json, stop

KEYS = ("head", "rows", "below", "at_chance")


@dataclass
class Notes:
    """What a file of notes says."""

    head: str = "notes"  # of the column
    rows: dict[str, str] = field(default_factory=dict)  # of X also for X-s0, X-s1, ..
    below: list[str] = field(default_factory=list)  # lines under the table
    # row -> why it may be at chance: said of one whose HR@1 cannot be told from it
    at_chance: dict[str, str] = field(default_factory=dict)

    def of(self, name: str, row: dict, chance: float) -> str:
        """What the last column says of a row of metrics.json."""
        said = [self.rows.get(name) or self.rows.get(unseeded(name), "")]
        why = self.at_chance.get(name) or self.at_chance.get(unseeded(name))
        low = row["hr@1_interval"][0]
        if why and low is not None and low <= chance:
            said.append(f"at chance: {why}")
        return "; ".join(filter(None, said))


def read_notes(path: Path | str | None) -> Notes | None:
    """The notes of a file; None without one."""
    if path is None:
        return None
    told = read_json(Path(path))
    if not isinstance(told, dict) or not set(told) <= set(KEYS):
        stop(f"{path} holds no notes; expected a JSON object with some of {', '.join(KEYS)}")
    return Notes(**told)


def with_notes(result: dict, notes: Notes | None) -> dict:
    """metrics.json with what the notes say: rows get a `said`, the table `said` (head, below)."""
    if notes is None:
        return result
    chance = result["chance"]["hr@1"]
    rows = {
        name: row | {"said": notes.of(name, row, chance)} for name, row in result["rows"].items()
    }
    return result | {"rows": rows, "said": {"head": notes.head, "below": notes.below}}
