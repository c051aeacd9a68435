"""From numpy to the device and back, without a stop where the device is a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on a device. To a GPU it goes from pinned memory, and the process does
    not wait for it: what is computed from it does."""
    tensor = torch.as_tensor(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fetched_later(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
    """A function that gives the tensor's numbers as an array. The copy from a GPU begins now, into
    pinned memory; only the function waits for it."""
    if tensor.device.type != "cuda":
        return tensor.cpu().numpy
    copied = tensor.to("cpu", non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def numbers():
        done.synchronize()
        return copied.numpy()

    return numbers


def one_behind(begun: Iterable, device: torch.device) -> Iterator:
    """Yields what is begun, each once the next has begun, so that a GPU computes while the one
    before is worked on; at once on a CPU, where nothing runs on its own and two batches would need
    twice the memory."""
    if device.type != "cuda":
        yield from begun
        return
    waiting = []
    for batch in begun:
        waiting.append(batch)
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting
