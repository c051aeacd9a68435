"""delrec/processes.py without other processes: what would be sent is made up here."""

from types import SimpleNamespace

import numpy as np
import torch
from scripts import sentence

from delrec import processes
from delrec.processes import gather_rows, setup, sum_gradients, sum_over_ranks


def test_rows_of_all_ranks_meet_at_their_places(alone, monkeypatch):
    assert np.isnan(gather_rows(np.ones((1, 2), np.float32), np.array([1]), 3, alone)).sum() == 4

    def all_gather(parts, own):  # what the other process would send
        rows, places = torch.tensor([[10.0], [12.0]]), torch.tensor([0, 2])
        parts[0].copy_(own)
        parts[1].copy_(rows if own.dim() == 2 else places)
        assert own.tolist() in ([1, -1], [[11.0], [0.0]])

    monkeypatch.setattr(processes.dist, "all_gather", all_gather)
    monkeypatch.setattr(processes, "max_over_ranks", lambda x, ranks: 2.0)
    two = SimpleNamespace(world=2, device=torch.device("cpu"))
    rows = gather_rows(np.array([[11.0]], np.float32), np.array([1]), 4, two)
    assert rows.dtype == np.float32
    assert rows[:3, 0].tolist() == [10, 11, 12]
    assert np.isnan(rows[3, 0])


def test_gradients_are_summed_not_averaged(alone, monkeypatch):
    params = [
        torch.zeros(3, 2, requires_grad=True),
        torch.zeros(2, dtype=torch.bfloat16, requires_grad=True),
        torch.zeros(1, requires_grad=True),
    ]
    params[0].grad = torch.arange(6.0).view(3, 2)
    params[1].grad = torch.tensor([1, 2.0], dtype=torch.bfloat16)
    # as if the other rank had the same
    monkeypatch.setattr(processes.dist, "all_reduce", lambda y: y.mul_(2))
    sum_gradients(params, alone)
    assert params[0].grad.tolist() == [[0, 1], [2, 3], [4, 5]]
    sum_gradients(params, SimpleNamespace(world=2, device=torch.device("cpu")))
    assert params[0].grad.tolist() == [[0, 2], [4, 6], [8, 10]]
    assert params[1].grad.tolist() == [2, 4]
    assert params[2].grad is None
    assert params[1].grad.dtype == torch.bfloat16


def test_what_is_summed_stays_what_it_was(monkeypatch):
    # an epoch's loss goes on after a checkpoint has held the sums of all processes
    monkeypatch.setattr(processes.dist, "all_reduce", lambda y: y.mul_(2))
    own = torch.tensor([3.0])
    two = SimpleNamespace(world=2, device=torch.device("cpu"))
    assert [sum_over_ranks(own, two).item() for _ in range(3)] == [6, 6, 6]
    assert own.item() == 3


def test_more_processes_than_gpus_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "--nproc_per_node asks for more than the 1 GPUs" in sentence(setup, 0)


def test_setup_seeds_everything(on_cpu):
    draws = [(setup(5), np.random.rand(), torch.rand(1).item())[1:] for _ in range(2)]
    assert draws[0] == draws[1] and (setup(6), np.random.rand())[1] != draws[0][0]
