"""Stage chain of make gpu: SmolLM2-135M with its real weights through all stages on ml-100k, by the
scripts themselves, in this one process.

Vectors come first, as they cost least; then titles, of which stage 2 sees 20,000 samples. A
backbone that an earlier time left in the output folder is used again.
"""

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import distill
import evaluate
import finetune
import train_backbone
from delrec.data import prepare
from delrec.data.prepared import Data, candidates, load_data
from delrec.evaluation.scores import gain_over, stored_metrics
from delrec.lm.ranker import Ranker, open_run, score_catalogue, score_tails, shown_histories
from delrec.lm.reading import read_prefix
from delrec.runtime import load_run, read_npy
from recipes import gpu_tiny
from recipes.gpu_rows import LEFT_OUT, USED_AGAIN, Rows
from recipes.gpu_time import seconds_of

REQUESTS = {"vectors": 4096, "titles": 512}  # of the rates
SIZES = {  # flags of (stage 1, stage 2)
    "vectors": (
        "--input ids --samples 4096 --batch 64 --micro 64 --val-samples 200 --evals 1",
        "--input ids --samples 8192 --batch 64 --micro 64 --val-samples 500 --evals 2",
    ),
    "titles": (
        "--samples 1024 --batch 32 --micro 32 --val-samples 64 --evals 1",
        "--verbalizer mean --show --samples 20000 --batch 64 --micro 64 --val-samples 500 "
        "--evals 2",
    ),
}
TINY = "--samples 24 --batch 4 --micro 4 --val-samples 8 --evals 1"


def measure(rows: Rows, rehearse: bool, quick: bool, out: Path) -> None:
    """Writes the rows of the backbone, of both forms of items, and of the difference."""
    device = torch.device("cpu" if rehearse else "cuda")
    world = World(out / "chain", rehearse, device)
    world.make_backbone(rows)
    for form in SIZES:
        if quick and form == "titles":
            rows.leave("chain.", LEFT_OUT)
            return
        rows.attempt(f"chain.{form}.", measure_form, rows, world, form)
    rows.attempt("chain.", compare, rows, world)


class World:
    """The data, the LM and the backbone of the chain."""

    def __init__(self, folder: Path, rehearse: bool, device: torch.device) -> None:
        self.folder, self.rehearse, self.device = folder, rehearse, device
        folder.mkdir(parents=True, exist_ok=True)
        if rehearse:
            self.data = str(gpu_tiny.log(folder.parent / "toy"))
            self.llm = str(gpu_tiny.lm(folder.parent / "toy" / "lm"))
            self.limit = 0
        else:
            gpu_tiny.script(prepare.main, "ml-100k")
            self.data, self.llm, self.limit = "ml-100k", "smollm2-135m", 2000
        self.backbone = folder / "sasrec"

    def make_backbone(self, rows: Rows) -> None:
        """Trains a SASRec, and writes how long it took; one of an earlier time is used as it is."""
        if (self.backbone / "config.json").exists():
            rows.add("chain.backbone.seconds", None, USED_AGAIN)
            return
        flags = "--epochs 2 --width 16" if self.rehearse else "--epochs 40"
        typed = f"--dataset {self.data} --out {self.backbone} --overwrite {flags}"
        gpu_tiny.script(train_backbone.main, typed)
        told = json.loads((self.backbone / "config.json").read_text())
        rows.add("chain.backbone.seconds", told["seconds"])

    def common(self, form: str, stage: int) -> str:
        """The flags of a stage that both forms share."""
        flags = SIZES[form][stage - 1]
        if self.rehearse:
            own = [part for part in ("--input ids", "--verbalizer mean --show") if part in flags]
            flags = " ".join([*own, TINY])
        named = f"--dataset {self.data} --backbone {self.backbone} --llm {self.llm}"
        return f"{named} --overwrite {flags}"


def measure_form(rows: Rows, world: World, form: str) -> None:
    """Writes the rows of items as `form`: both stages' rates, requests a second, HR@1."""
    base, prompt = f"chain.{form}", world.folder / f"prompt-{form}"
    told = gpu_tiny.script(distill.main, f"{world.common(form, 1)} --out {prompt}")
    rows.add(f"{base}.stage1.samples_per_second", gpu_tiny.last_json(told)["samples_per_second"])
    tuned = world.folder / form
    typed = f"{world.common(form, 2)} --soft-prompt {prompt} --out {tuned}"
    typed = typed.replace(f"--backbone {world.backbone} ", "")  # the soft prompt's own
    told = gpu_tiny.script(finetune.main, typed)
    rows.add(f"{base}.stage2.samples_per_second", gpu_tiny.last_json(told)["samples_per_second"])
    rows.attempt(f"{base}.scoring", requests, rows, world, form)
    limit = f"--limit {world.limit}" if world.limit else ""
    told = gpu_tiny.script(
        evaluate.main, f"--ckpt {world.backbone} {tuned} {limit} --val-samples 8"
    )
    print(re.findall(r".* samples/s scored by LMs.*", told))
    data = load_data(world.data)
    rows.add(f"{base}.hr1", hits_of(tuned, data, asked_of(tuned)).mean())


@torch.no_grad()
def requests(rows: Rows, world: World, form: str) -> None:
    """Writes requests a second: fifteen candidates each, and the whole catalogue each. Prompts are
    formed before; the LM's check at load is passed.
    """
    data = load_data(world.data)
    run = load_run(world.folder / form)
    ranker, _ = open_run(run, data, world.device)
    n = min(REQUESTS[form] if not world.rehearse else 8, len(data.test))
    samples = np.asarray(data.test)[:n]
    cand_nC = candidates(data, "test", 15)[:n]
    olds = [h[h > 0] for h in shown_histories(ranker, samples)]
    tails = [ranker.prompts.history(old, cand)[0] for old, cand in zip(olds, cand_nC)]
    alone = SimpleNamespace(rank=0, world=1, device=world.device, main=False)
    seconds = seconds_of(lambda: score_tails(ranker, tails, cand_nC, alone), world.device, 3)
    rows.add(f"chain.{form}.scoring.requests_per_second", n / seconds)
    seconds = seconds_of(partial(over_all, ranker, tails), world.device, 3)
    rows.add(f"chain.{form}.catalogue.requests_per_second", n / seconds)


def over_all(ranker: Ranker, tails: list[np.ndarray], batch: int = 512) -> None:
    """Scores of the whole catalogue for every prompt, fetched to the host batch by batch."""
    start = read_prefix(ranker.lm, ranker.prompts.prefix, ranker.P, ranker.cache)
    for i in range(0, len(tails), batch):
        score_catalogue(ranker, start, tails[i : i + batch])


def asked_of(folder: Path) -> np.ndarray:
    """The places of the test samples of which a run was asked."""
    return np.flatnonzero(np.isfinite(read_npy(folder / "scores_test_15.npy")).all(1))


def hits_of(folder: Path, data: Data, which: np.ndarray) -> np.ndarray:
    """HR@1 of a run for each of the test samples at the places `which`."""
    return stored_metrics(folder, data, which)["hr@1"]


def compare(rows: Rows, world: World) -> None:
    """Writes HR@1 of the backbone on the same samples, and the paired difference with the ends of
    its interval over users.
    """
    data, folder = load_data(world.data), world.folder / "titles"
    which = asked_of(folder)
    own_n, other_n = hits_of(folder, data, which), hits_of(world.backbone, data, which)
    rows.add("chain.backbone.hr1", other_n.mean())
    for end, value in zip(("", "_low", "_high"), gain_over(own_n, other_n, data, which)):
        rows.add(f"chain.titles.minus_backbone{end}", value)
