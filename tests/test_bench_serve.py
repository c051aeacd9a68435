"""recipes/bench_serve.py: a row for every backbone, alone and in a batch, and a large catalogue;
recipes/bench_api.py: what the API adds, loading, many users.
"""

import os

import pytest

from delrec.serving.onnx_file import NEEDED, is_missing
from recipes import bench_api, bench_serve

needs_onnx = pytest.mark.skipif(
    not os.environ.get("CI") and any(map(is_missing, NEEDED)),
    reason="needs pip install onnx onnxruntime",
)


@needs_onnx
def test_every_backbone_and_a_large_catalogue_have_their_rows(toy, script):
    result = script(bench_serve.main, "--dataset", toy.folder, "--items", 500, "--seconds", 0).json
    assert [(row["model"], row["batch"]) for row in result["rows"]] == [
        (model, batch) for model in bench_serve.DEFAULTS for batch in (1, 64)
    ]
    assert all(min(row[way]) > 0 for row in result["rows"] for way in ("torch", "onnx"))
    large = result["large"]
    assert large["items"] == 500 and large["bytes"] == 501 * 100 * 4
    assert large["times_reading"][0] == pytest.approx(large["onnx"][0] / large["read"][0], rel=0.1)


def test_calls_take_turns_on_the_same_input():
    asked = []
    calls = {name: (lambda x, name=name: asked.append((name, x))) for name in "ab"}
    found = bench_serve.in_turn(calls, [1, 2, 3], 0, 4)
    turns = asked[2:]  # behind a first call of each
    assert turns == [(n, x) for n in "ab" for x in (1, 2, 3, 1)]
    assert set(found) == {"a", "b"}


def test_the_api_s_rows(sasrec, toy, script, monkeypatch):
    monkeypatch.setattr(bench_api, "LOADS", 1)
    flags = ["--dataset", toy.folder, "--users", 300, "--seconds", 0]
    result = script(bench_api.main, sasrec, *flags).json
    assert [row["batch"] for row in result["asking"]] == [1, 64]
    assert all(row[way] > 0 for row in result["asking"] for way in ("torch", "ids", "titles"))
    assert 0 < result["load_backbone_seconds"] < 60
    assert result["users"]["n"] == 300 and result["users"]["peak_gb"] > 0


def test_an_lm_s_run_is_timed_by_its_own_flag(chain, script):
    refused = script(bench_api.main, chain.delrec, code=1)
    assert "is no backbone; give a backbone" in refused.error
