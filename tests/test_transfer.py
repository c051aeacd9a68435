"""Arrays to a device and back."""

import numpy as np
import torch

from delrec.lm.transfer import fetched_later, on_device, one_behind

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def begun(said):
    for batch in range(3):
        said.append(f"begin {batch}")
        yield batch


def test_a_gpu_s_batch_is_worked_on_once_the_next_has_begun():
    said = []
    for batch in one_behind(begun(said), GPU):
        said.append(f"use {batch}")
    assert said == ["begin 0", "begin 1", "use 0", "begin 2", "use 1", "use 2"]


def test_on_a_cpu_one_batch_exists_at_a_time():
    said = []
    for batch in one_behind(begun(said), CPU):
        said.append(f"use {batch}")
    assert said == ["begin 0", "use 0", "begin 1", "use 1", "begin 2", "use 2"]


def test_no_batches_are_none():
    assert list(one_behind([], GPU)) == list(one_behind([], CPU)) == []


def test_what_is_sent_comes_back():
    array = np.arange(6).reshape(2, 3)
    assert np.array_equal(fetched_later(on_device(array, CPU))(), array)
