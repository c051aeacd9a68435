"""What the paper prints beside a row, its Figure 8, and the runs that a case study shows."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from delrec.evaluation.cases import told_apart
from delrec.evaluation.figures import sweep_figure
from delrec.evaluation.paper import printed_numbers, sweeps_of


def test_the_paper_s_numbers_stand_beside_what_they_belong_to():
    assert (
        printed_numbers("beauty", "DELRec (SASRec)")["hr@1"] == 0.3177
        and printed_numbers("ml-100k", "w/o TA")["ndcg@10"] == 0.5797
    )
    assert printed_numbers("steam-au", "SASRec") is None and printed_numbers("beauty", None) is None


def test_a_sweep_is_a_curve(tmp_path, chain):
    runs, value, low_high = {}, {}, {}
    for k, h in ((20, 10), (40, 10), (80, 10), (80, 5), (80, 20)):
        folder = tmp_path / f"p{k}-{h}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"k": k, "h": h}))
        runs[folder.name] = SimpleNamespace(stage="finetune", soft_prompt=str(folder))
        value[folder.name], low_high[folder.name] = (
            {"hr@1": np.array([k / 100, h / 100])},
            {"hr@1": (0, 1)},
        )
    found = sweeps_of(runs, value, low_high)
    assert set(found["k"]) == {"20", "40", "80"} and set(found["h"]) == {"5", "10", "20"}
    assert found["k"]["40"]["hr@1"] == pytest.approx(0.25)
    # vectors and titles are no points of one curve
    of_vectors = tmp_path / "vectors"
    of_vectors.mkdir()
    (of_vectors / "config.json").write_text(json.dumps({"k": 80, "h": 10, "input": "ids"}))
    runs["vectors"] = SimpleNamespace(stage="finetune", soft_prompt=str(of_vectors))
    value["vectors"], low_high["vectors"] = {"hr@1": np.array([0.9, 0.9])}, {"hr@1": (0, 1)}
    assert sweeps_of(runs, value, low_high) == found
    fig = sweep_figure(
        {
            "sweeps": found,
            "reference": "sasrec",
            "rows": {"sasrec": {"hr@1": 0.5}},
            "candidates": 15,
        },
        "k",
    )
    assert list(fig.axes[0].lines[0].get_xdata()) == [20, 40, 80]


def test_what_differs_in_more_than_its_soft_prompt_s_length_is_no_point_of_the_curve(tmp_path):
    """Runs of Figure 8, two seeds of one of them, and ablations that are far above it."""
    runs, value, low_high = {}, {}, {}

    def add(name, hr, stage_1=(), stage_2=()):
        folder = tmp_path / f"p-{name}"
        folder.mkdir()
        seed = int(name[-1])
        seeds = {"seed": seed, "backbone": f"/runs/sasrec-s{seed}", "data_folder": "data/toy"}
        prompt = {"k": 80, "h": 10, "tasks": "both", "llm": "lm", **dict(stage_1), **seeds}
        results = {"finished": hr}
        (folder / "config.json").write_text(json.dumps(prompt | results))
        tuned = {"maps": str(folder), "samples": 48, "k": 80, **dict(stage_2), **seeds}
        runs[name] = SimpleNamespace(
            stage="finetune", soft_prompt=str(folder), **tuned, folder=folder, seconds=hr
        )
        value[name], low_high[name] = {"hr@1": np.full(2, hr)}, {"hr@1": (hr, hr)}

    for k in (20, 40, 60):
        add(f"k{k}-s0", k / 100, {"k": k})
    add("delrec-s0", 0.4)
    add("delrec-s1", 0.6)
    add("random-s0", 0.9, {"llm": "random-0:lm"})
    add("no-ta-s0", 0.9, {"tasks": "rps"})
    add("more-s0", 0.9, stage_2={"samples": 96})
    add("moved-s0", 0.9, stage_2={"lr_prompt": 5e-3})
    found = sweeps_of(runs, value, low_high)
    curve = {k: v["hr@1"] for k, v in found["k"].items()}
    assert curve == pytest.approx({"20": 0.2, "40": 0.4, "60": 0.6, "80": 0.5})
    assert set(found) == {"k"}


def test_the_case_study_shows_what_is_compared(chain):
    def run(name, stage, soft_prompt="none"):
        return SimpleNamespace(
            stage=stage, soft_prompt=soft_prompt, folder=SimpleNamespace(name=name)
        )

    runs = [
        run(f"{m}-s{s}", "train_backbone") for m in ("sasrec", "gru4rec", "caser") for s in range(3)
    ] + [run("lm", "lm")]
    runs += [
        run(f"{m}-s{s}", "finetune") for m in ("llara", "words", "no-prompt") for s in range(2)
    ] + [run(f"delrec-s{s}", "finetune", str(chain.prompt)) for s in range(2)]
    assert told_apart({r.folder.name: r for r in runs}, "sasrec-s1") == [
        "sasrec-s1",
        "lm",
        "delrec-s0",
        "llara-s0",
        "words-s0",
        "no-prompt-s0",
        "gru4rec-s0",
        "caser-s0",
    ]
