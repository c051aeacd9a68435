"""The processes of torchrun: joining them, sums over them, work shared among them.

A process that is alone does the same, and talks to nobody. One that runs a command waits for it.
"""

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from delrec.runtime import stop


@dataclass(frozen=True)
class Ranks:
    """This process among those of torchrun."""

    rank: int  # its number
    world: int  # how many there are
    device: torch.device  # where it computes

    @property
    def main(self) -> bool:
        """Is it the first, which prints and writes?"""
        return self.rank == 0


def setup(seed: int) -> Ranks:
    """This process; it has joined torchrun's process group, if there is one, and all its generators
    are seeded alike on all processes."""
    rank, world = (int(os.environ.get(name, d)) for name, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    device = own_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, **own_corner(rank, world))
    np.random.seed(seed)
    torch.manual_seed(seed)
    return Ranks(rank, world, device)


def own_device(local: int) -> torch.device:
    """The GPU of process number `local` of this machine, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local >= torch.cuda.device_count():
        stop(
            f"process {local} has no GPU: --nproc_per_node asks for more than the "
            f"{torch.cuda.device_count()} GPUs of this machine"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def own_corner(rank: int, world: int) -> dict:
    """What else init_process_group is given: where torchrun started the processes again, a place
    of their own to meet, because the launcher's store still holds the addresses of those before.
    """
    store = launchers_store() if restarted() else None
    if store is None:
        return {}
    attempt = f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    return {"store": dist.PrefixStore(attempt, store), "rank": rank, "world_size": world}


def launchers_store() -> dist.TCPStore | None:
    """The store of torchrun's launcher, as old as the job; None where it keeps none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False)


def restarted() -> bool:
    """True in a process that torchrun --max-restarts started again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def job_began() -> float:
    """When torchrun's job began, in seconds since 1970, however often it started its processes
    again: whoever asks first writes it into the launcher's store. 0 where there is none."""
    store = launchers_store()
    return float(store.compare_set("delrec/began", "", str(time.time()))) if store else 0.0


def note_stop() -> None:
    """Tells the launcher's store that this job was asked to stop: exit code 75 is a failure to
    torchrun, and --max-restarts starts the processes again."""
    if store := launchers_store():
        store.set("delrec/stopped", "1")


def stopped_before() -> bool:
    """True in a process that torchrun started again after its job was asked to stop."""
    store = launchers_store() if restarted() else None
    return store is not None and store.check(["delrec/stopped"])


def finish(ranks: Ranks) -> None:
    """Leaves the process group; all wait for each other."""
    if ranks.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def sum_over_ranks(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """A tensor summed over all processes, in fp32 (gloo has no bf16 sum). It stays what it was."""
    if ranks.world == 1:
        return x
    y = x.detach().to(ranks.device, torch.float32, copy=True)  # the sum is written into it
    dist.all_reduce(y)
    return y.to(x.device, x.dtype)


def max_over_ranks(x: float, ranks: Ranks) -> float:
    """The largest of a number over all processes."""
    y = torch.tensor(float(x), device=ranks.device)
    dist.all_reduce(y, dist.ReduceOp.MAX)
    return y.item()


def sum_gradients(params: list[torch.Tensor], ranks: Ranks) -> None:
    """Makes every gradient the sum over all processes.

    Every rank's loss is already divided by the global batch, so that is the gradient of one
    process.
    """
    if ranks.world > 1:
        grads = [p.grad for p in params if p.grad is not None]
        flat = torch.cat([g.flatten().float() for g in grads]).to(ranks.device)
        dist.all_reduce(flat)
        for g, part in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(part.view_as(g))


def shares(
    pieces: Sequence, ranks: Ranks, even: bool = False, first: int = 0
) -> list[tuple[Any, int]]:
    """This rank's pieces of work, every world-th, as pairs (piece, 1).

    even: as many passes on every rank, because the passes of a sharded LM are made together; a rank
    that has nothing left repeats the first piece as (piece, 0), whose result counts for nothing.
    first: the rank that has the first piece, modulo world.
    """
    mine = [(piece, 1) for piece in pieces[(ranks.rank - first) % ranks.world :: ranks.world]]
    if even and len(pieces):
        most = -(-len(pieces) // ranks.world)
        mine += [(pieces[0], 0)] * (most - len(mine))
    return mine


def gather_rows(rows: np.ndarray, index: np.ndarray, n: int, ranks: Ranks) -> np.ndarray:
    """The full float32 array (n, ...) of rows (m, ...) that each rank computed for its samples
    `index`; NaN where nobody has one."""
    full = np.full((n, *rows.shape[1:]), np.nan, np.float32)
    if ranks.world == 1:
        full[index] = rows
        return full
    # all ranks send blocks of one size, rows without a place at the end
    most = int(max_over_ranks(len(index), ranks))
    block, place = np.zeros((most, *rows.shape[1:]), np.float32), np.full(most, -1)
    block[: len(index)], place[: len(index)] = rows, index
    for places, blocks in zip(all_of(place, ranks), all_of(block, ranks)):
        full[places[places >= 0]] = blocks[places >= 0]
    return full


def all_of(array: np.ndarray, ranks: Ranks) -> list[np.ndarray]:
    """The arrays of all processes, which have the same shape on each."""
    own = torch.as_tensor(array, device=ranks.device)
    gathered = [torch.empty_like(own) for _ in range(ranks.world)]
    dist.all_gather(gathered, own)
    return [t.cpu().numpy() for t in gathered]


def of_main(data: bytes, ranks: Ranks) -> bytes:
    """The bytes of the first process, on every one."""
    if ranks.world == 1:
        return data
    size = torch.tensor(len(data), device=ranks.device)
    dist.broadcast(size, 0)
    sent = torch.zeros(int(size), dtype=torch.uint8, device=ranks.device)
    if ranks.main:
        sent.copy_(torch.from_numpy(np.frombuffer(data, np.uint8).copy()))
    dist.broadcast(sent, 0)
    return sent.cpu().numpy().tobytes()


def run_to_its_end(command: list[str], **more: Any) -> subprocess.CompletedProcess:
    """What subprocess.run returns. Ctrl-C, which a terminal sends to the command too, is raised
    once that has ended: a training finishes its step and saves, where subprocess.run would kill it
    after a quarter of a second."""
    with subprocess.Popen(command, **more) as process:
        try:
            said = process.communicate()
        except KeyboardInterrupt:
            process.communicate()
            raise
    return subprocess.CompletedProcess(command, process.returncode, *said)
