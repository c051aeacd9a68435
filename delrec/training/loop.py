"""What makes a training run resumable, logged and forecast. It sees no loss and no gradient.

What a checkpoint holds are parts with state_dict() and load_state_dict(), as torch's own modules
have them: flat dictionaries of tensors and of what JSON holds.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch

from delrec.processes import Ranks
from delrec.training import checkpoints
from delrec.training.log import Log, cut_log
from delrec.training.memory import peak_gb, total_bytes


class Part(Protocol):
    """What a checkpoint holds."""

    def state_dict(self) -> dict:
        """What it is now."""

    def load_state_dict(self, state: dict, /) -> Any:
        """Makes it what it was."""


class Loop:
    """The steps of a run that may be killed anywhere.

    total: how many steps, or with unit="epoch" how many epochs, the run has at most. resume: it
    goes on from the newest checkpoint. validations: {step (0 is the first) that ends with one: what
    it costs, in steps}.
    """

    def __init__(
        self,
        saver: checkpoints.Saver,
        name: str,
        total: int,
        resume: bool = False,
        validations: dict[int, float] | None = None,
        unit: str = "step",
    ):
        self.saver, self.ranks = saver, saver.ranks
        self.name, self.total, self.unit = name, total, unit
        self.validations = validations or {}
        self.parts = {}
        self.epoch = self.step = 0  # where the run stands: steps done in this epoch
        self.done = 0  # steps done in all
        self.spent = {"steps": 0.0, "validation": 0.0}  # seconds
        self.counts = Counter()  # of whatever the script counts
        self.first_steps = []  # seconds of the first three, for the forecast
        self.earlier = 0.0  # seconds before the run was killed
        self.began, self.elsewhere = time.time(), 0.0
        self.lines, self.found = None, {}
        if found := saver.load() if resume else None:
            self.done, tensors, state = found
            self.epoch, self.step = state["at"]
            self.spent, self.first_steps = state["spent"], state["first_steps"]
            self.earlier, self.counts = state["seconds"], Counter(state["counts"])
            self.began -= self.earlier
            self.found = tensors | state
        checkpoints.listen()

    def keep(self, **parts: Part) -> None:
        """Names parts that a checkpoint holds. In a resumed run each becomes what it was."""
        self.parts |= parts
        if self.found:
            for name, part in parts.items():
                own = {k: v for k, v in self.found.items() if k.startswith(f"{name}.")}
                part.load_state_dict({k.removeprefix(f"{name}."): v for k, v in own.items()})

    def over(self, batches: list | np.ndarray) -> Iterator[tuple[int, Any]]:
        """Pairs (step, batch) for the batches of an epoch that are still to do. After each a
        checkpoint is written when one is due, and the process ends if it was asked to."""
        self.found = {}  # every part has taken its own
        for step in range(self.step, len(batches)):
            began, self.elsewhere = time.time(), 0.0
            yield step, batches[step]
            self.count(time.time() - began - self.elsewhere)
            self.step, self.done = step + 1, self.done + 1
            if self.done == 3 and self.unit == "step" and self.total > 3:
                left = [cost for v, cost in self.validations.items() if v > step]
                forecast(self.first_steps, self.total, left, self.ranks)
            asked = checkpoints.stop_asked(self.ranks)
            if asked or self.saver.due(self.done):
                self.save()
            if asked and not (self.unit == "step" and self.done == self.total):
                self.close()
                self.saver.end(self.done)

    def count(self, seconds: float) -> None:
        """Adds the time of a step, what was spent elsewhere left out."""
        self.spent["steps"] += seconds
        if len(self.first_steps) < 3:
            self.first_steps.append(seconds)

    @contextlib.contextmanager
    def elsewhere_than_steps(self, name: str | None = None) -> Iterator[None]:
        """The time inside is not counted as the step's; with a name it is counted under that."""
        began = time.time()
        yield
        seconds = time.time() - began
        self.elsewhere += seconds
        if name:
            self.spent[name] += seconds

    def next_epoch(self) -> None:
        """Ends an epoch; a checkpoint is written."""
        self.epoch, self.step = self.epoch + 1, 0
        self.save()

    def save(self) -> None:
        """Writes a checkpoint of all parts; every process calls it."""
        tensors, state = {}, {}
        for name, part in self.parts.items():
            for key, value in part.state_dict().items():
                kind = tensors if torch.is_tensor(value) else state
                kind[f"{name}.{key}"] = value
        state |= {
            "at": [self.epoch, self.step],
            "spent": self.spent,
            "counts": self.counts,
            "first_steps": self.first_steps,
            "seconds": time.time() - self.began,
        }
        self.saver.save(self.done, tensors, state)

    def log(self, number: int, **fields: Any) -> None:
        """One line of the log, of step (or epoch) `number`."""
        if self.lines is None:
            first = self.step
            if self.unit == "epoch":  # an epoch's line is written when it begins
                first = self.epoch - 1 if self.step == 0 else self.epoch
            out = self.saver.folder.parent
            cut_log(out, self.name, first, self.ranks)
            self.lines = Log(out, self.total, self.name, self.ranks, self.unit, max(first, 0))
        self.lines.step(number, **fields)

    def close(self) -> None:
        """Ends the log."""
        if self.lines:
            self.lines.close()

    def lm_share(self) -> float:
        """The share of the run's time that its passes of the LM took, in steps and validations;
        the making of prompts is left out of both."""
        return round(sum(self.spent.values()) / (time.time() - self.began), 3)


def forecast(step_seconds: list[float], steps: int, validations: list[float], ranks: Ranks) -> None:
    """Prints, after the first steps, the time and the memory that the run will take. validations:
    what each that is left costs, in steps."""
    if not ranks.main:
        return
    seconds, steps_left = np.median(step_seconds), steps - len(step_seconds)
    left = seconds * (steps_left + sum(validations))
    gpu, total = ranks.device.type == "cuda", total_bytes(ranks.device)
    used = torch.cuda.max_memory_allocated() / 2**30 if gpu else peak_gb()
    where = "the GPU" if gpu else "memory"
    print(
        f"{len(step_seconds)} steps took {seconds:.2f} s each: about {left / 60:.1f} minutes to go "
        f"for {steps_left} steps and {len(validations)} validations; {used:.1f} GB of {where} at "
        "the peak so far" + (f", it has {total / 2**30:.0f}" if total else ""),
        flush=True,
    )


# ---------------------------------------------------------------- parts of a checkpoint


class Weights:
    """Parameters, by their number in the list."""

    def __init__(self, params: Iterable[torch.Tensor]):
        self.params = list(params)

    def state_dict(self) -> dict:
        """{number: parameter}."""
        return {str(i): p for i, p in enumerate(self.params)}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Gives the parameters the values of a state."""
        for i, p in enumerate(self.params):
            p.copy_(state[str(i)])


class OptimiserState:
    """What an optimiser knows of each parameter: {parameter.key: tensor}."""

    def __init__(self, optimiser: torch.optim.Optimizer):
        self.optimiser = optimiser

    def state_dict(self) -> dict:
        """{parameter.key: tensor}."""
        known = self.optimiser.state_dict()["state"]
        return {f"{i}.{k}": torch.as_tensor(v) for i, s in known.items() for k, v in s.items()}

    def load_state_dict(self, state: dict) -> None:
        """Gives the optimiser what it knew."""
        known = {}
        for key, value in state.items():
            number, name = key.split(".", 1)
            known.setdefault(int(number), {})[name] = value
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": known})


class Best:
    """The best step so far by validation: its quality (larger is better), its number, the weights
    {name: tensor} it had, and what else was found there."""

    def __init__(self, device: torch.device):
        self.device = device
        self.quality, self.step = None, 0
        self.weights, self.found = {}, {}

    def offer(
        self, quality: float, step: int, weights: dict[str, torch.Tensor], **found: Any
    ) -> None:
        """Takes a step if it is better than the best so far."""
        if self.quality is None or quality > self.quality:
            self.quality, self.step, self.found = quality, step, found
            self.weights = {k: w.detach().clone() for k, w in weights.items()}

    def state_dict(self) -> dict:
        """The best step so far; empty before the first."""
        if self.quality is None:
            return {}
        weights = {f"weights.{k}": w for k, w in self.weights.items()}
        found = {
            f"found.{k}": torch.as_tensor(v) if isinstance(v, np.ndarray) else v
            for k, v in self.found.items()
        }
        return {"quality": self.quality, "step": self.step, **weights, **found}

    def load_state_dict(self, state: dict) -> None:
        """Makes this the best step so far, its tensors on the device."""
        if not state:
            return
        self.quality, self.step = state["quality"], state["step"]
        for key, value in state.items():
            kind, _, name = key.partition(".")
            if kind == "weights":
                self.weights[name] = value.to(self.device)
            elif kind == "found":
                self.found[name] = value.numpy() if torch.is_tensor(value) else value
