"""The processes of torchrun: joining them, sums over them, work shared among them.

One process alone is the same with no talk.

`ranks` is what setup returns: rank (this process' number), world (how many there are), device, main
(is it the first?).
"""

import os
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from delrec.runtime import stop


def setup(seed):
    """Join torchrun's process group if there is one.

    Returns rank, world, device; seeds every generator alike on all ranks.
    """
    rank, world, local = (
        int(os.environ.get(v, d)) for v, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            stop(
                f"process {local} has no GPU: --nproc_per_node asks for more than the "
                f"{torch.cuda.device_count()} GPUs of this machine"
            )
        torch.cuda.set_device(local)
        device = torch.device("cuda", local)
    else:
        device = torch.device("cpu")
    if world > 1 and not dist.is_initialized():
        more = {}
        if restarted() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # the launcher's store still holds the addresses of the processes before; each attempt
            # gets a corner of its own
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
            )
            more = {
                "store": dist.PrefixStore(
                    f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store
                ),
                "rank": rank,
                "world_size": world,
            }
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **more)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return SimpleNamespace(rank=rank, world=world, device=device, main=rank == 0)


def restarted():
    """True in a process that torchrun --max-restarts started again: it continues as with
    --resume.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def finish(ranks):
    if ranks.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def sum_over_ranks(x, ranks):
    """Sum a tensor over all processes, in fp32 (gloo has no bf16 sum)."""
    if ranks.world == 1:
        return x
    y = x.detach().to(ranks.device, torch.float32)
    dist.all_reduce(y)
    return y.to(x.device, x.dtype)


def max_over_ranks(x, ranks):
    """The largest of a number over all processes."""
    y = torch.tensor(float(x), device=ranks.device)
    dist.all_reduce(y, dist.ReduceOp.MAX)
    return y.item()


def sum_gradients(params, ranks):
    """Every rank's loss is already divided by the global batch, so the sum of the gradients is the
    gradient of one process.
    """
    if ranks.world > 1:
        grads = [p.grad for p in params if p.grad is not None]
        flat = sum_over_ranks(torch.cat([g.flatten().float() for g in grads]), ranks)
        for g, part in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(part.view_as(g))


def shares(pieces, ranks, even=False):
    """This rank's pieces of work, every world-th, as pairs (piece, 1). even: as many passes on
    every rank, because the passes of a sharded LM are made together; a rank that has nothing left
    repeats the first piece as (piece, 0), whose result counts for nothing.
    """
    mine = [(piece, 1) for piece in pieces[ranks.rank :: ranks.world]]
    return (
        mine + [(pieces[0], 0)] * (-(-len(pieces) // ranks.world) - len(mine))
        if even and len(pieces)
        else mine
    )


def gather_rows(rows, index, n, ranks):
    """Rows (m, ...) computed by this rank for samples `index` -> the full float32 array (n, ...),
    NaN where nobody has one.
    """
    full = np.full((n, *rows.shape[1:]), np.nan, np.float32)
    parts = [(index, rows)]
    if ranks.world > 1:
        # all ranks send blocks of one size, rows without a place at the end
        most = int(max_over_ranks(len(index), ranks))
        block, place = np.zeros((most, *rows.shape[1:]), np.float32), np.full(most, -1)
        block[: len(index)], place[: len(index)] = rows, index
        gathered = []
        for x in (place, block):
            x = torch.as_tensor(x, device=ranks.device)
            gathered.append([torch.empty_like(x) for _ in range(ranks.world)])
            dist.all_gather(gathered[-1], x)
        parts = [
            (i.cpu().numpy()[i.cpu().numpy() >= 0], r.cpu().numpy()[i.cpu().numpy() >= 0])
            for i, r in zip(*gathered)
        ]
    for i, r in parts:
        full[i] = r
    return full
