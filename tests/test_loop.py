"""loop.py: a run that may be killed anywhere goes on where it stood, is logged and forecast."""

import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import log_of

from delrec.training import checkpoints
from delrec.training import loop as loops
from delrec.training.checkpoints import STOPPED, Saver
from delrec.training.loop import Best, Loop, OptimiserState, Weights


class Recorder:
    """A saver that keeps checkpoints in memory: (step, tensors, state)."""

    def __init__(self, ranks, every, folder):
        self.ranks, self.every, self.folder = ranks, every, folder / "checkpoints"
        self.saved, self.ended = [], []

    def due(self, done):
        return self.every and done % self.every == 0

    def save(self, done, tensors, state):
        self.saved.append((done, tensors, state))

    def load(self):
        return self.saved[-1] if self.saved else None

    def end(self, done):
        self.ended.append(done)
        raise SystemExit(STOPPED)


class Seen:
    """A part of a checkpoint: the batches that were met."""

    def __init__(self):
        self.batches = []

    def state_dict(self):
        return {"batches": list(self.batches)}

    def load_state_dict(self, state):
        self.batches = [tuple(batch) for batch in state["batches"]]  # JSON knows no tuples


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """The signals that asked the process to stop; the real ones are left as they are."""
    signals = []
    monkeypatch.setattr(checkpoints, "listen", lambda: None)
    monkeypatch.setattr(checkpoints, "asked", signals)
    return signals


@pytest.fixture
def saver(alone, tmp_path):
    """saver(every): a Recorder, due every so many steps."""
    return lambda every=0: Recorder(alone, every, tmp_path)


def begun(saver, total, resume=False, **more):
    """A loop, and the batches it has met."""
    loop, seen = Loop(saver, "test", total, resume, **more), Seen()
    loop.keep(seen=seen)
    return loop, seen


def walk(loop, seen, batches, stop_at=None, asked=None):
    """Meets the batches that are left; a signal comes during step `stop_at`."""
    for step, batch in loop.over(batches):
        seen.batches.append((step, batch))
        if step == stop_at:
            asked.append(15)


LETTERS = "abcdef"
WHOLE = list(enumerate(LETTERS))


# ---------------------------------------------------------------- where it stands


def test_every_batch_of_a_run_is_met_once_and_in_order(saver):
    loop, seen = begun(saver(), 6)
    walk(loop, seen, LETTERS)
    assert seen.batches == WHOLE
    assert (loop.step, loop.done) == (6, 6)


@pytest.mark.parametrize("stop_at", [0, 2, 4])
def test_a_stopped_run_goes_on_where_it_stood(saver, asked, stop_at):
    keeper = saver()
    with pytest.raises(SystemExit) as end:
        walk(*begun(keeper, 6), LETTERS, stop_at, asked)
    assert end.value.code == STOPPED
    assert keeper.ended == [stop_at + 1]
    assert [done for done, _, _ in keeper.saved] == [stop_at + 1]  # the step was finished first
    asked.clear()
    loop, seen = begun(keeper, 6, resume=True)
    assert seen.batches == WHOLE[: stop_at + 1]
    walk(loop, seen, LETTERS)
    assert seen.batches == WHOLE
    assert loop.done == 6


def test_a_stopped_run_says_so_and_goes_on_from_disk(alone, asked, tmp_path, capsys):
    folder = tmp_path / "run"
    with pytest.raises(SystemExit):
        walk(*begun(Saver(folder, 0, {}, alone), 6), LETTERS, 2, asked)
    said = capsys.readouterr().out
    assert f"stopped as asked after step 3, saved in {folder}" in said
    assert "run the same command with --resume to continue" in said
    asked.clear()
    loop, seen = begun(Saver(folder, 0, {}, alone), 6, resume=True)
    assert "continuing from step 3" in capsys.readouterr().out
    walk(loop, seen, LETTERS)
    assert seen.batches == WHOLE


def test_a_run_that_is_asked_to_stop_in_its_last_step_is_finished(saver, asked):
    keeper = saver()
    loop, seen = begun(keeper, 6)
    walk(loop, seen, LETTERS, stop_at=5, asked=asked)
    assert seen.batches == WHOLE
    assert keeper.ended == []


def test_without_resume_a_run_begins_at_the_beginning(saver):
    keeper = saver(2)
    walk(*begun(keeper, 6), LETTERS)
    loop, seen = begun(keeper, 6)
    assert (loop.step, loop.done, seen.batches) == (0, 0, [])


def test_a_resumed_run_without_a_checkpoint_begins_at_the_beginning(saver):
    loop, seen = begun(saver(), 6, resume=True)
    walk(loop, seen, LETTERS)
    assert seen.batches == WHOLE


def test_a_run_stopped_in_its_second_epoch_goes_on_there(saver, asked):
    keeper = saver()
    loop, seen = begun(keeper, 3, unit="epoch")
    walk(loop, seen, LETTERS)
    loop.next_epoch()
    assert (loop.epoch, loop.step, loop.done) == (1, 0, 6)
    with pytest.raises(SystemExit):
        walk(loop, seen, LETTERS, stop_at=1, asked=asked)
    asked.clear()
    loop, seen = begun(keeper, 3, resume=True, unit="epoch")
    assert (loop.epoch, loop.step, loop.done) == (1, 2, 8)
    walk(loop, seen, LETTERS)
    assert seen.batches == WHOLE + WHOLE


def test_a_run_of_epochs_that_is_asked_to_stop_in_the_last_step_stops(saver, asked):
    # the validation of the epoch is still to come
    keeper = saver()
    with pytest.raises(SystemExit):
        walk(*begun(keeper, 6, unit="epoch"), LETTERS, stop_at=5, asked=asked)
    assert keeper.ended == [6]


def test_a_signal_is_answered_also_where_no_step_is_left(saver, asked, capfd):
    walk(*begun(saver(), 6), LETTERS)
    checkpoints.note(signal.SIGTERM, None)
    assert "after the last step the run is finished" in capfd.readouterr().err
    assert asked == [signal.SIGTERM]


# ---------------------------------------------------------------- what is saved


def test_a_checkpoint_is_written_when_one_is_due_and_at_the_end_of_an_epoch(saver):
    keeper = saver(2)
    loop, seen = begun(keeper, 1, unit="epoch")
    walk(loop, seen, "abcde")
    assert [done for done, _, _ in keeper.saved] == [2, 4]
    assert keeper.saved[0][2]["seen.batches"] == [(0, "a"), (1, "b")]
    loop.next_epoch()
    assert [done for done, _, _ in keeper.saved] == [2, 4, 5]
    assert keeper.saved[-1][2]["at"] == [1, 0]


def test_tensors_and_what_json_holds_of_each_part_come_back_under_its_own_name(saver):
    keeper = saver(1)
    loop = Loop(keeper, "test", 1)
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    loop.keep(first=Weights([one]), second=Weights([two, one]))
    walk(loop, Seen(), "a")
    _, tensors, state = keeper.saved[0]
    assert {"first.0", "second.0", "second.1"} == set(tensors)
    assert not any(torch.is_tensor(value) for value in state.values())
    again = [torch.zeros(2), torch.zeros(1), torch.zeros(2)]
    resumed = Loop(keeper, "test", 1, resume=True)
    resumed.keep(second=Weights(again[1:]))
    resumed.keep(first=Weights(again[:1]))
    assert [w.tolist() for w in again] == [[1, 2], [3], [1, 2]]


def test_a_part_gets_nothing_of_another_whose_name_begins_alike(saver):
    keeper = saver(1)
    loop = Loop(keeper, "test", 1)
    seen = Seen()
    loop.keep(best=seen, best_of_all=Seen())
    walk(loop, seen, "a")
    given = []
    part = SimpleNamespace(load_state_dict=given.append)
    Loop(keeper, "test", 1, resume=True).keep(best=part)
    assert given == [{"batches": [(0, "a")]}]


def test_seconds_and_counts_are_those_of_the_whole_run(saver, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(loops, "time", SimpleNamespace(time=lambda: clock.now))
    keeper = saver(2)
    loop, _ = begun(keeper, 4)
    for _ in loop.over("ab"):
        with loop.elsewhere_than_steps("validation"):
            clock.now += 10
        with loop.elsewhere_than_steps():
            clock.now += 100
        clock.now += 1
        loop.counts["prompts"] += 3
    assert loop.spent == {"steps": 2.0, "validation": 20.0}
    assert loop.lm_share() == round(22 / 222, 3)
    clock.now += 5000  # it was killed, and started again much later
    resumed, _ = begun(keeper, 4, resume=True)
    assert resumed.spent == {"steps": 2.0, "validation": 20.0}
    assert resumed.counts == {"prompts": 6}
    assert resumed.earlier == 222
    assert resumed.lm_share() == round(22 / 222, 3)


def test_the_log_of_a_resumed_run_holds_each_step_once(saver, asked, tmp_path):
    def logged(loop, stop_at=None):
        for step, _ in loop.over(LETTERS):
            loop.log(step + 1, loss=float(step))
            if step == stop_at:
                asked.append(15)
        loop.close()

    keeper = saver(2)
    with pytest.raises(SystemExit):
        logged(Loop(keeper, "test", 6), stop_at=4)
    asked.clear()
    del keeper.saved[-1]  # as if it had been killed: the checkpoint of step 4 is the newest
    logged(Loop(keeper, "test", 6, resume=True))
    assert [(line["step"], line["loss"]) for line in log_of(tmp_path)] == [
        (step + 1, float(step)) for step in range(6)
    ]


# ---------------------------------------------------------------- the forecast


def test_the_forecast_is_printed_once_after_the_third_step(saver, capsys, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(loops, "time", SimpleNamespace(time=lambda: clock.now))
    loop, said = Loop(saver(), "test", 9, validations={2: 4.0, 5: 4.0, 8: 4.0}), []
    for _ in loop.over(range(9)):
        clock.now += 60
        said.append(capsys.readouterr().out)
    said.append(capsys.readouterr().out)
    # what is said after the third step is read in the fourth
    assert [bool(text) for text in said] == [n == 3 for n in range(10)]
    # 6 steps of a minute, and the 2 validations that are left of four minutes each
    assert "3 steps took 60.00 s each: about 14.0 minutes to go" in said[3]
    assert "for 6 steps and 2 validations" in said[3]


def test_a_resumed_run_does_not_forecast_again(saver, asked, capsys):
    keeper = saver()
    with pytest.raises(SystemExit):
        walk(*begun(keeper, 6), LETTERS, stop_at=3, asked=asked)
    assert capsys.readouterr().out.count("to go") == 1
    asked.clear()
    walk(*begun(keeper, 6, resume=True), LETTERS)
    assert "to go" not in capsys.readouterr().out


@pytest.mark.parametrize("total, unit", [(3, "step"), (6, "epoch")])
def test_three_steps_and_epochs_have_no_forecast(total, unit, saver, capsys):
    walk(*begun(saver(), total, unit=unit), range(total))
    assert "to go" not in capsys.readouterr().out


# ---------------------------------------------------------------- the best step


def offered(best, *qualities):
    """Offers steps 1, 2, .. of these qualities, all from one weight that moves on."""
    weight = torch.zeros(1)
    for step, quality in enumerate(qualities, 1):
        weight += 1
        scores = np.full(2, step, np.float32)
        best.offer(quality, step, {"w": weight}, scores=scores, after={"rps": quality})
    return best


def test_best_keeps_the_weights_that_the_best_step_had():
    best = offered(Best(torch.device("cpu")), 0.3, 0.5, 0.4)
    assert (best.quality, best.step) == (0.5, 2)
    assert best.weights["w"].item() == 2  # not what the weight became
    assert best.found["scores"].tolist() == [2, 2]


def test_of_equals_best_keeps_the_first():
    assert offered(Best(torch.device("cpu")), 0.5, 0.5, 0.4).step == 1


def test_a_quality_of_0_or_below_counts_too():
    assert offered(Best(torch.device("cpu")), -2.0, -1.0, -3.0).step == 2


def test_best_survives_a_checkpoint_on_disk(alone, tmp_path):
    saver = Saver(tmp_path / "run", 1, {}, alone)
    loop = Loop(saver, "test", 1)
    loop.keep(best=offered(Best(alone.device), 0.3, 0.5, 0.4))
    walk(loop, Seen(), "a")
    best = Best(alone.device)
    Loop(saver, "test", 1, resume=True).keep(best=best)
    assert (best.quality, best.step) == (0.5, 2)
    assert best.weights["w"].tolist() == [2]
    assert best.found["after"] == {"rps": 0.5}
    assert isinstance(best.found["scores"], np.ndarray)
    assert best.found["scores"].tolist() == [2, 2]
    # it is compared with what comes later
    best.offer(0.5, 3, {"w": torch.zeros(1)})
    assert best.step == 2
    best.offer(0.6, 4, {"w": torch.zeros(1)})
    assert best.step == 4


def test_a_best_of_nothing_survives_too(saver):
    keeper = saver(1)
    loop = Loop(keeper, "test", 1)
    loop.keep(best=Best(torch.device("cpu")))
    walk(loop, Seen(), "a")
    best = Best(torch.device("cpu"))
    Loop(keeper, "test", 1, resume=True).keep(best=best)
    assert (best.quality, best.step, best.weights) == (None, 0, {})


def test_an_optimiser_goes_on_as_if_it_had_never_stopped():
    def descend(w, optimiser, n):
        for _ in range(n):
            w.grad = 2 * w.detach() + 1
            optimiser.step()

    def begin(value):
        w = torch.nn.Parameter(value)
        return w, torch.optim.Adam([w], lr=0.1)

    whole, optimiser = begin(torch.tensor([1.0, -3.0]))
    descend(whole, optimiser, 3)
    known = {k: v.clone() for k, v in OptimiserState(optimiser).state_dict().items()}
    again, other = begin(whole.detach().clone())
    OptimiserState(other).load_state_dict(known)
    descend(whole, optimiser, 3)
    descend(again, other, 3)
    assert torch.equal(whole, again)
