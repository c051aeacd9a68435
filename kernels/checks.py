"""What the verbalizer asks of the tensors it is given. Each check raises ValueError with the
tensors' names and shapes; the letters of the names are explained in verbalizer.py.
"""

from typing import NoReturn

import torch
from torch import Tensor

from .reference import real

INTS = (torch.int32, torch.int64, torch.int16, torch.uint8, torch.int8)


def refuse_shapes(names: str, tensors: tuple[Tensor, ...], expected: str) -> NoReturn:
    """Raises ValueError with the shapes of some tensors, and what was expected."""
    raise ValueError(
        f"{names} have shapes {', '.join(str(tuple(t.shape)) for t in tensors)}; expected "
        f"{expected}"
    )


def must_have_rank(t: Tensor, name: str, rank: int) -> None:
    """Raises ValueError unless the tensor has so many dimensions."""
    if t.dim() != rank:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {rank} dimensions")


def must_be_integers(t: Tensor, name: str) -> None:
    """Raises ValueError unless the tensor holds integers."""
    if t.dtype not in INTS:
        raise ValueError(f"{name} is {t.dtype}, expected integers")


def must_be_within(t: Tensor, name: str, end: int, why: str) -> None:
    """Raises ValueError unless every number is in 0 .. end - 1: one look at the device's memory; an
    id out of range would read anywhere.
    """
    if t.numel():
        low, high = map(int, t.aminmax())
        if low < 0 or high >= end:
            bad = low if low < 0 else high
            raise ValueError(
                f"{name} of shape {tuple(t.shape)} holds {bad}, expected 0..{end - 1}: {why}"
            )


def titles_must_fit(tok_BCT: Tensor, n_BC: Tensor, V: int) -> None:
    """Raises ValueError unless lengths are within 0..T and the titles' own tokens within the
    vocabulary; what stands behind a title's end may be anything.
    """
    if fits_at_a_glance(tok_BCT, n_BC, V):
        return
    must_be_within(
        n_BC,
        "n_BC",
        tok_BCT.shape[2] + 1,
        f"lengths are 0..T, tok_BCT has shape {tuple(tok_BCT.shape)}",
    )
    must_be_within(real(tok_BCT, n_BC), "tok_BCT", V, f"head_VD has {V} rows")


def fits_at_a_glance(tok_BCT: Tensor, n_BC: Tensor, V: int) -> bool:
    """True where the C++ loops can look and the titles fit: microseconds; the words of
    titles_must_fit are for when they do not."""
    whole = tok_BCT.is_contiguous() and n_BC.is_contiguous()
    int32 = tok_BCT.dtype == n_BC.dtype == torch.int32
    if tok_BCT.device.type != "cpu" or not (whole and int32):
        return False
    from . import cpu

    return bool(cpu.library()) and cpu.titles_fit(tok_BCT, n_BC, V)


def head_must_fit(x: Tensor, head_VD: Tensor, bias_V: Tensor | None) -> None:
    """Raises ValueError unless x, head and bias go together: width, dtype, device, memory."""
    must_have_rank(head_VD, "head_VD", 2)
    if x.shape[1] != head_VD.shape[1]:
        refuse_shapes("x and head_VD", (x, head_VD), "the same width D")
    if x.dtype != head_VD.dtype:
        raise ValueError(
            f"x of shape {tuple(x.shape)} is {x.dtype}, head_VD of shape {tuple(head_VD.shape)} is "
            f"{head_VD.dtype}; expected one dtype"
        )
    if not x.is_floating_point():
        raise ValueError(
            f"x of shape {tuple(x.shape)} and head_VD are {x.dtype}, expected floating point"
        )
    V, D = head_VD.shape
    scattered = D > 1 and head_VD.stride(1) != 1
    overlapping = V > 1 and head_VD.stride(0) < D
    if scattered or overlapping:
        raise ValueError(
            f"head_VD of shape {tuple(head_VD.shape)} has strides {head_VD.stride()}, x has shape "
            f"{tuple(x.shape)}; expected rows in one "
            "piece (stride 1 along D): pass head_VD.contiguous()"
        )
    if bias_V is not None and bias_V.shape != head_VD.shape[:1]:
        refuse_shapes("bias_V and head_VD", (bias_V, head_VD), "one bias per row of the head")
    if x.device != head_VD.device:
        raise ValueError(f"x is on {x.device}, head_VD on {head_VD.device}; expected one device")


def must_rise(ptr: Tensor, name: str, tok: Tensor, tok_name: str) -> None:
    """Raises ValueError unless ptr never falls and stays within the tokens."""
    must_be_integers(ptr, name)
    if not len(ptr):
        raise ValueError(f"{name} is empty, expected one more entry than titles")
    if bool((ptr.diff() < 0).any()) or int(ptr[0]) < 0 or int(ptr[-1]) > len(tok):
        raise ValueError(
            f"{name} of shape {tuple(ptr.shape)} must rise within 0..{len(tok)}, the length of "
            f"{tok_name}"
        )


def must_cover(ptr: Tensor, name: str, tok: Tensor, tok_name: str) -> None:
    """Raises ValueError unless ptr rises from 0 to the number of tokens."""
    must_rise(ptr, name, tok, tok_name)
    if int(ptr[0]) or int(ptr[-1]) != len(tok):
        raise ValueError(
            f"{name} runs from {int(ptr[0])} to {int(ptr[-1])}, expected 0 to the "
            f"{len(tok)} rows of {tok_name} and x_ND"
        )


def catalogue_must_fit(
    x_BD: Tensor,
    head_VD: Tensor,
    ptr_I1: Tensor,
    tok_M: Tensor,
    bias_V: Tensor | None,
    known: bool = False,
) -> None:
    """Raises ValueError unless x, head and a catalogue in CSR form go together. known: the numbers
    in ptr and tok need no look."""
    must_have_rank(x_BD, "x_BD", 2)
    must_have_rank(ptr_I1, "ptr_I1", 1)
    must_have_rank(tok_M, "tok_M", 1)
    head_must_fit(x_BD, head_VD, bias_V)
    must_be_integers(tok_M, "tok_M")
    if known:
        return
    must_rise(ptr_I1, "ptr_I1", tok_M, "tok_M")
    must_be_within(tok_M, "tok_M", len(head_VD), f"head_VD has shape {tuple(head_VD.shape)}")
