"""Inputs of the verbalizer's kernels, their results in loops and fp64, and who computes: the
reference, the C++ loops and the Triton kernels (Triton's interpreter on a CPU; `pytest -m gpu` runs
the same tests on a device).
"""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from delrec.kernels import cpu
from delrec.kernels import verbalizer as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# (B, C, T, V, D): one of each; nothing a multiple of a block; titles longer than a block of tokens,
# more than one block of everything
SHAPES = [(1, 1, 1, 7, 8), (3, 5, 7, 101, 48), (2, 15, 33, 211, 300), (9, 4, 6, 997, 577)]


TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}


def available(impl):
    if impl == "cpp" and not cpu.library():
        pytest.skip("no C++ compiler here")
    if impl == "interpreted" and (
        torch.cuda.is_available() or pytest.importorskip("triton") is None
    ):
        pytest.skip("with a GPU the Triton kernels run on it (-m gpu)")
    if impl == "gpu" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return SimpleNamespace(
        impl={"interpreted": "triton", "gpu": "triton"}.get(impl, impl),
        device="cuda" if impl == "gpu" else "cpu",
        name=impl,
        **{
            f: on(
                getattr(kernels, f),
                {"interpreted": "triton", "gpu": "triton"}.get(impl, impl),
                "cuda" if impl == "gpu" else "cpu",
            )
            for f in kernels.__all__
        },
    )


def on(function, impl, device):
    """The function with its tensors carried to the device and its results back (gradients flow
    through both).
    """

    def call(*args, **kwargs):
        args = [moved(a, device) for a in args]
        kwargs = {k: moved(v, device) for k, v in kwargs.items()}
        out = function(*args, impl=impl, **kwargs)
        return tuple(o.cpu() for o in out) if isinstance(out, tuple) else out.cpu()

    return call


def moved(a, device):
    """A tensor on the device, all else as it is. A view with gaps stays one, in a copy of its whole
    buffer: to() alone would close the gaps.
    """
    if not isinstance(a, torch.Tensor):
        return a
    if a.requires_grad or a.is_contiguous():
        return a.to(device)
    whole = a.as_strided((a.untyped_storage().nbytes() // a.element_size(),), (1,), 0)
    return whole.to(device).as_strided(a.shape, a.stride(), a.storage_offset())


class NothingFetched(TorchDispatchMode):
    """Within it a number that python asks a tensor for is a fault: on a GPU the process would wait
    there until all that was launched is done.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in FETCHING, "a number was fetched from a tensor"
        return function(*args, **(kwargs or {}))


FETCHING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


def close(got, true, tol=2e-6):
    """fp32 against fp64, relative to the largest number there is."""
    assert got.dtype == torch.float32 and got.shape == true.shape
    assert (got.double() - true).abs().max() <= tol * true.abs().max().clamp(min=1)


def no_worse(got, torchs, true, dtype):
    """The error against fp64 is at most torch's own in this dtype, plus a little."""
    scale = true.abs().max().clamp(min=1)
    assert (got.double() - true).abs().max() <= (torchs.double() - true).abs().max() + TOLERANCE[
        dtype
    ] * scale


def inputs(seed=0, B=3, C=7, T=5, V=23, D=13, bias=True, dtype=torch.float32):
    """Ragged titles: some empty, some of one token, tokens repeated; places beyond a title's end
    hold tokens that must not count.
    """
    g = torch.Generator().manual_seed(seed)
    x, head, b = (
        torch.randn(B, D, generator=g),
        torch.randn(V, D, generator=g),
        torch.randn(V, generator=g),
    )
    tok, n = (
        torch.randint(0, V, (B, C, T), generator=g),
        torch.randint(0, T + 1, (B, C), generator=g),
    )
    for c, length in enumerate((T, 1, 0)[:C]):
        n[0, c] = length
    tok[0, 0] = tok[0, 0, 0]  # one token T times
    return x.to(dtype), head.to(dtype), tok, n, b.to(dtype) if bias else None


def loop_scores(x, head, tok, n, bias):
    """mean over t < n of head[tok] . x + bias[tok], one number at a time."""
    rows = []
    for b in range(tok.shape[0]):
        for c in range(tok.shape[1]):
            logits = [
                head[v] @ x[b] + (0 if bias is None else bias[v])
                for v in tok[b, c, : n[b, c]].tolist()
            ]
            rows.append(sum(logits) / len(logits) if logits else x.new_zeros(()))
    return torch.stack(rows).view(tok.shape[:2])


def fp64(*tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def poisoned(head, seed=0):
    """The same head inside a larger buffer of NaN: rows stand further apart than D, and one more
    row, the last, is NaN.
    """
    V, D = head.shape
    room = torch.full((V + 1, D + 9), torch.nan, dtype=head.dtype)
    room[:V, 2 : D + 2] = head
    return room[:, 2 : D + 2]


def titles_of(seed=0, lengths=(3, 0, 1, 5, 2), V=23, D=13, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    N = sum(lengths)
    ptr = torch.tensor([0, *lengths]).cumsum(0)
    tok = torch.randint(0, V, (N,), generator=g)
    tok[3:6] = tok[3]  # a repeated token
    return (
        torch.randn(N, D, generator=g).to(dtype),
        torch.randn(V, D, generator=g).to(dtype),
        tok,
        ptr,
        torch.randn(V, generator=g).to(dtype),
    )


def loop_likelihood(x, head, tok, ptr, bias, normalise):
    out = []
    for a, b in zip(ptr[:-1].tolist(), ptr[1:].tolist()):
        logp = [
            (head @ x[i] + (0 if bias is None else bias)).log_softmax(0)[tok[i]]
            for i in range(a, b)
        ]
        out.append(sum(logp) / (len(logp) if normalise else 1) if logp else x.new_zeros(()))
    return torch.stack(out)


def catalogue(seed=0, lengths=(0, 2, 1, 4, 2, 3), V=23, D=13, B=3, dtype=torch.float32):
    """Item 4 has item 1's title; item 0 is the padding item without tokens."""
    x, head, tok, ptr, b = titles_of(seed, lengths, V, D, dtype)
    tok[ptr[4] : ptr[5]] = tok[ptr[1] : ptr[2]]
    return (
        torch.randn(B, D, generator=torch.Generator().manual_seed(seed + 1)).to(dtype),
        head,
        ptr,
        tok,
        b,
    )
