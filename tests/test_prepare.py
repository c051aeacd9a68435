"""data/prepare.py: the same bytes again, one sentence for bad input, nothing left behind."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from logs import BAD, contents, prepared, random_log, run, toy, write
from pictures import drawing

from delrec.data import prepare

SCRIPT = Path(prepare.__file__)


def test_neither_hash_seed_nor_row_order_matter(tmp_path):
    rows = random_log(prefix="x")
    shuffled = [rows[i] for i in np.random.default_rng(2).permutation(len(rows))]
    titles = {item: f"The {item}" for item in sorted({row[1] for row in rows})}
    folders = []
    for seed, log, names in (("1", rows, titles), ("2", shuffled, dict(reversed(titles.items())))):
        raw, out = write(tmp_path / f"raw{seed}", log, titles=names), tmp_path / f"out{seed}"
        subprocess.run(
            [sys.executable, SCRIPT, "toy", "--raw", raw, "--out", out],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        folders.append(out)
    assert contents(folders[0]) == contents(folders[1])
    with drawing():
        assert run("toy", "--raw", tmp_path / "raw1", "--out", tmp_path / "again").exit_code == 0
    assert all(
        (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
        for path in folders[0].iterdir()
    )


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, case):
    change, args, says = BAD[case]
    raw = write(tmp_path / "raw", toy())
    change(raw)
    result = run(
        "toy",
        "--raw",
        raw,
        "--out",
        tmp_path / "out",
        *([] if "--core" in args else ["--core", 1]),
        *args,
    )
    assert result.exit_code == 1 and says in result.output, result.output
    assert result.output.startswith("Error: ") and result.output.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


@pytest.mark.parametrize("name", [".hidden", "a/b", "..", "", "a b"])
def test_bad_name(name):
    result = run(name, "--raw", "anywhere")
    assert result.exit_code == 1 and "cannot name a folder" in result.output


def test_unknown_name_lists_the_known_ones():
    result = run("netflix")
    assert (
        result.exit_code == 1
        and "ml-100k, ml-1m, " in result.output
        and "smollm2-135m" in result.output
        and "--raw FOLDER" in result.output
    )


def test_only_a_prepared_folder_is_replaced(tmp_path):
    raw, out = write(tmp_path / "raw", toy()), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    result = run("toy", "--raw", raw, "--out", out, "--core", 1)
    assert (
        result.exit_code == 1
        and "is no prepared folder" in result.output
        and (out / "thesis.txt").exists()
    )
    result = run("toy", "--raw", raw, "--out", raw, "--core", 1)
    assert (
        result.exit_code == 1
        and "would replace it" in result.output
        and (raw / "items.csv").exists()
    )


def test_a_failed_run_leaves_the_older_preparation(tmp_path, monkeypatch):
    data, _ = prepared(tmp_path, toy())
    before = contents(data.folder)

    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "write_json", full)
    result = run(
        "toy", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--core", 2, "--seed", 3
    )
    assert result.exit_code == 1 and "Error: " in result.output
    result = run(
        "toy",
        "--raw",
        tmp_path / "raw",
        "--out",
        tmp_path / "out",
        "--core",
        1,
        "--seed",
        3,
        "--overwrite",
    )
    assert result.exit_code == 1 and "No space left" in result.output
    assert contents(data.folder) == before and sorted(path.name for path in tmp_path.iterdir()) == [
        "out",
        "raw",
    ]
