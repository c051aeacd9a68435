"""What serving a run costs: milliseconds and parameters (evaluate.py --latency)."""

import math
import time
from pathlib import Path

import numpy as np
import torch

from delrec.data.prepared import Data, histories, subset
from delrec.lm import offsets, ranker
from delrec.lm.model import is_lm_run
from delrec.lm.pretrained import EMBEDDED, numbers_of, seed_and_name
from delrec.processes import Ranks
from delrec.runtime import CACHE, Run, folder_of, load_run
from delrec.serving.ranking import ScoresAfter, ranking
from delrec.serving.shared import shapes_in

OWN_WEIGHTS = (ranker.ITEMS, offsets.FILE, ranker.PROMPT, ranker.ADAPTER)


def add_latency(result: dict, runs: dict[str, Run], data: Data, pool: int) -> None:
    """Adds to the rows that are runs how long a request takes, on what, and their parameters."""
    for name, run in runs.items():
        print(f"timing {name}", flush=True)
        row = result["rows"][name]
        row["ms"], row["parameters"] = latencies(run, data, pool), parameters(run)
        row["ms_on"] = timed_on(run)


def latencies(run: Run, data: Data, pool: int = 100) -> tuple[float, float, float]:
    """(ms at batch 1 on one core, ms at batch 1, ms a request at batch 64); all of an LM on the GPU
    where there is one (timed_on). pool: as of ranking.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rank = ranking(run, data, Ranks(0, 1, device), pool)
    samples = np.asarray(data.test)[subset(len(data.test), 512, 0)]
    olds = [h[h > 0] for h in histories(data, samples, 50)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one_core = milliseconds(rank, olds, 1)
    torch.set_num_threads(threads)
    return one_core, milliseconds(rank, olds, 1), milliseconds(rank, olds, 64)


def timed_on(run: Run) -> str:
    """On what a request alone is timed: an LM takes the GPU, a backbone serves without one."""
    on_gpu = run.stage != "train_backbone" and torch.cuda.is_available()
    return "the GPU" if on_gpu else "one core"


def milliseconds(
    rank: ScoresAfter, olds: list[np.ndarray], batch: int, seconds: float = 3
) -> float:
    """Median ms a request takes when `batch` come at once (all of `olds`, where they are fewer)."""
    batch = min(batch, len(olds))
    places = max(len(olds) - batch, 1)  # where a batch may begin
    spent, began, at = [], time.time(), 0
    rank(olds[:batch])
    while len(spent) < 5 or (time.time() - began < seconds and len(spent) < 200):
        at = (at + batch) % places
        start = time.time()
        rank(olds[at : at + batch])
        spent.append(time.time() - start)
    return 1000 * float(np.median(spent)) / batch


def parameters(run: Run) -> int:
    """Numbers a run needs to serve."""
    if run.stage == "train_backbone":
        return run.parameters
    own = [run.folder / name for name in OWN_WEIGHTS]
    if getattr(run, "residual", None) or getattr(run, "user_states", None):
        own.append(run.folder / ranker.BACKBONE)
    folder = lm_folder(run)
    files = list(folder.glob("*.safetensors"))
    rest = 0 if files else numbers_of(run.llm, folder)  # pytorch_model.bin, which nobody unpickles
    return rest + sum(map(numbers_in, [*filter(Path.exists, own), *files]))


def lm_folder(run: Run) -> Path:
    """The folder that holds the weights of a run's LM."""
    from transformers.utils import cached_file

    # a run as LM: its adapter is merged into its own LM's weights
    while is_lm_run(run.llm):
        run = load_run(run.llm)
    _, llm = seed_and_name(run.llm)  # random weights are as many
    folder = CACHE / llm if llm == EMBEDDED else folder_of("runs", llm)
    return folder if folder.is_dir() else Path(cached_file(llm, "config.json")).parent


def numbers_in(path: Path) -> int:
    """How many numbers a safetensors file holds."""
    return sum(map(math.prod, shapes_in(path).values()))
