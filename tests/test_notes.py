"""evaluate.py --notes: what is said of the rows of a table beside what was measured."""

import csv

import pytest

import evaluate
from delrec.evaluation.notes import Notes
from delrec.runtime import read_json, write_json

TOLD = {"head": "what differs", "rows": {"sasrec": "ours | A & B", "popularity": "no model"}}


@pytest.fixture
def table(toy, sasrec, script, on_cpu, tmp_path):
    """table(notes, code) -> the folder of a table of one run, or the sentence that refuses it."""

    def make(notes, code=0):
        write_json(tmp_path / "notes.json", notes)
        asked = ["--ckpt", sasrec, "--dataset", toy.folder, "--limit", 40, "--out", tmp_path / "t"]
        asked += ["--notes", tmp_path / "notes.json", "--report", tmp_path / "t.html"]
        done = script(evaluate.main, *asked, code=code)
        return done.error if code else tmp_path / "t"

    return make


def test_the_last_column_says_what_the_notes_say(table):
    folder = table(TOLD | {"below": ["in kind: nothing is the paper's"]})
    text = (folder / "table.txt").read_text()
    head, line = (next(x for x in text.splitlines() if x.startswith(y)) for y in ("row", "sasrec"))
    assert head.endswith("what differs") and line.endswith("ours | A & B")
    apart = head.index("what differs") - head.index("chosen")
    assert line.index("ours") - line.index("ce loss") == apart
    assert "\nin kind: nothing is the paper's\n" in text
    marked = (folder / "table.md").read_text()
    assert "| ours \\| A & B |" in marked and "| chosen | what differs |" in marked
    assert "ours | A \\& B" in (folder / "table.tex").read_text()
    with open(folder / "table.csv") as f:
        rows = {row["row"]: row["what differs"] for row in csv.DictReader(f)}
    assert rows["popularity"] == "no model" and rows["chance"] == ""
    assert read_json(folder / "metrics.json")["rows"]["popularity"]["said"] == "no model"
    page = folder.with_name("t.html").read_text()
    assert "ours | A &amp; B" in page and "nothing is the paper" in page


def test_notes_of_a_row_are_those_of_all_its_seeds_and_say_why_it_is_at_chance():
    notes = Notes(rows={"llara": "style"}, at_chance={"llara": "few samples"})
    guess, better = ({"hr@1_interval": (low, 0.09)} for low in (0.05, 0.08))
    assert notes.of("llara-s1", guess, 1 / 15) == "style; at chance: few samples"
    assert notes.of("llara-s1", better, 1 / 15) == "style"
    assert notes.of("chance", guess, 1 / 15) == ""
    assert notes.of("llara-s0", {"hr@1_interval": (None, None)}, 1 / 15) == "style"


@pytest.mark.parametrize("told", [["a"], {"row": {"a": "b"}}])
def test_a_file_that_holds_no_notes_is_refused(told, table):
    assert "holds no notes; expected a JSON object with some of head" in table(told, 1)
