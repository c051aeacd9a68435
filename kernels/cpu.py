"""The C++ loops, cpu.cpp and its headers: built once with the machine's own compiler, kept under
the user's cache folder, called through ctypes.

A plain shared library: no torch headers, so it builds in seconds and serves every torch version. It
is compiled for this very CPU, so the CPU's features are part of the name it is kept under.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from delrec.runtime import cache_folder

SOURCE = Path(__file__).with_name("cpu.cpp")
HEADERS = sorted(SOURCE.parent.glob("*.h"))
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC"]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SILENT = (  # functions that return nothing
    "scores",
    "scores_dx",
    "likelihood",
    "head_gradient",
    "logits",
    "catalogue",
    "topk",
    "rms_norm",
    "silu_mul",
    "attention",
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None (said once, in one line) where it cannot be built; then the torch
    reference does the work.
    """
    compiler = compiler_here()
    if compiler is None:
        return say_none("no C++ compiler (g++) found")
    path = cache_folder() / "kernels" / f"verbalizer-{key_of(compiler)}.so"
    try:
        if not path.exists():
            failure = build(compiler, path)
            if failure:
                return say_none(failure)
        lib = ctypes.CDLL(str(path))
    except OSError as e:
        return say_none(str(e))
    for name in SILENT:
        getattr(lib, f"verbalizer_{name}").restype = None
    return lib


def compiler_here() -> str | None:
    """The path of a C++ compiler: $CXX, or g++, or what is called c++ or clang++."""
    asked = shutil.which(os.environ.get("CXX", "g++"))
    return asked or shutil.which("c++") or shutil.which("clang++")


def key_of(compiler: str) -> str:
    """16 hex digits of all that the library is made of: code, flags, compiler, CPU."""
    code = [path.read_text() for path in (SOURCE, *HEADERS)]
    known = [*code, *FLAGS, compiler, platform.machine(), cpu_features()]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]


@functools.cache
def cpu_features() -> str:
    """The line of /proc/cpuinfo that names the CPU's features; elsewhere the CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def has_fast_bf16() -> bool:
    """True on CPUs that multiply bf16 in hardware; elsewhere it is emulated, slower than fp32."""
    features = cpu_features()
    return "avx512_bf16" in features or "amx_bf16" in features


def build(compiler: str, path: Path) -> str:
    """Builds the library. Returns why it could not be built, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # renamed when whole: processes that build at once do not meet
    with tempfile.TemporaryDirectory(dir=path.parent) as room:
        command = [compiler, *FLAGS, str(SOURCE), "-o", f"{room}/v.so"]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            said = built.stderr.strip().splitlines() or ["no message"]
            return f"{compiler} failed: {said[-1][:200]}"
        os.replace(f"{room}/v.so", path)
    return ""


def say_none(why: str) -> None:
    """Says in one line why there is no library."""
    print(
        f"kernels: {why}; plain torch does their work (the same numbers but for rounding, slower "
        "and with more memory)",
        file=sys.stderr,
        flush=True,
    )


def call(name: str, *args: object) -> int | None:
    """What a function of the library returns. Tensors go as pointers, integers as int64, None as a
    null pointer.

    As many threads as torch has: its OpenMP need not be the library's.
    """
    library().verbalizer_threads(ctypes.c_int(torch.get_num_threads()))
    return getattr(library(), f"verbalizer_{name}")(*map(as_c, args))


def as_c(value: object) -> object:
    """A value as ctypes passes it."""
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else value


def dtype(t: Tensor) -> ctypes.c_int:
    """The number by which the library knows a tensor's dtype."""
    return ctypes.c_int(DTYPES[t.dtype])


# ---------------------------------------------------------------- candidate scores


def titles_fit(tok_BCT: Tensor, n_BC: Tensor, V: int) -> bool:
    """True if every length is in 0..T and every token before a title's end in 0..V-1. Both int32
    and contiguous.
    """
    return bool(call("titles_fit", tok_BCT, n_BC, n_BC.numel(), tok_BCT.shape[2], V))


def scores(
    x_BD: Tensor, head_VD: Tensor, tok_BCT: Tensor, n_BC: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """score_BC without the bias, and what backward needs: with gradient the mean rows (B, C, D)
    fp32, else None. tok and n int32, all but the head contiguous.
    """
    B, C, T = tok_BCT.shape
    D = x_BD.shape[1]
    head = (head_VD, head_VD.stride(0))
    score_BC = torch.empty(B, C)
    mean_BCD = torch.empty(B, C, D) if gradient else None
    call("scores", dtype(head_VD), x_BD, *head, tok_BCT, n_BC, score_BC, mean_BCD, B, C, T, D)
    return score_BC, mean_BCD


def scores_dx(
    g_BC: Tensor, mean_BCD: Tensor, head_VD: Tensor, tok_BCT: Tensor, n_BC: Tensor
) -> Tensor:
    """dx[b] = sum_c g[b, c] mean[b, c]: fp32 (B, D)."""
    B, C, D = mean_BCD.shape
    dx_BD = torch.empty(B, D)
    call("scores_dx", g_BC, mean_BCD, dx_BD, B, C, D)
    return dx_BD


# ---------------------------------------------------------------- title likelihood


def log_probs(
    x_ND: Tensor, head_VD: Tensor, tok_N: Tensor, bias_V: Tensor | None, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """log softmax(head x[i] + bias)[tok[i]]: fp32 (N,); with gradient also its derivative to x[i]:
    fp32 (N, D), else None.
    """
    N, D = x_ND.shape
    V = head_VD.shape[0]
    head = (head_VD, head_VD.stride(0))
    logp_N = torch.empty(N)
    diff_ND = torch.empty(N, D) if gradient else None
    call("likelihood", dtype(head_VD), x_ND, *head, bias_V, tok_N, logp_N, diff_ND, N, V, D)
    return logp_N, diff_ND


def softmax_sums(
    x_ND: Tensor, head_VD: Tensor, bias_V: Tensor, tok_NK: Tensor, weight_NK: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the softmax p_i over all rows of the head at x_i, whose logits are head x_i + bias, and of
    K targets tok_NK with weights, whose sum is w_i; all fp32:

    log_sum_N: log sum_v exp(head_v x_i + bias_v);
    mean_ND: sum_v p_i[v] head_v, the gradient of log_sum_i to x_i;
    dhead_VD, dbias_V: the gradients of sum_i (w_i log_sum_i - sum_k weight_ik logit_i[tok_ik]).

    The biases are finite. x and the rows of the head lie in one piece; head's rows may have gaps.
    """
    (N, D), V, K = x_ND.shape, len(head_VD), tok_NK.shape[1]
    inputs = (dtype(head_VD), x_ND, head_VD, head_VD.stride(0), bias_V.float().contiguous())
    logp_N, diff_ND = torch.empty(N), torch.empty(N, D)
    call("likelihood", *inputs, None, logp_N, diff_ND, N, V, D)
    log_sum_N, dhead_VD, dbias_V = -logp_N, torch.empty(V, D), torch.empty(V)
    targets = (tok_NK.int().contiguous(), weight_NK.float().contiguous())
    call("head_gradient", *inputs, log_sum_N, *targets, dhead_VD, dbias_V, N, K, V, D)
    return log_sum_N, -diff_ND, dhead_VD, dbias_V


# ---------------------------------------------------------------- the catalogue


def by_users(
    x_BD: Tensor, head_VD: Tensor, bias_V: Tensor | None
) -> Iterator[tuple[int, int, Tensor]]:
    """The logits of a few users at a time, users innermost: (first user, how many, logit_VL)."""
    V, D = head_VD.shape
    lanes, tables = library().verbalizer_lanes(), library().verbalizer_tables()
    head = (head_VD, head_VD.stride(0))
    room = torch.empty(min(tables, -(-len(x_BD) // lanes)), V, lanes)
    for b in range(0, len(x_BD), tables * lanes):
        part = x_BD[b : b + tables * lanes]
        call("logits", dtype(head_VD), part, *head, bias_V, room, len(part), V, D)
        for i in range(0, len(part), lanes):
            yield b + i, min(lanes, len(part) - i), room[i // lanes]


def catalogue_scores(
    x_BD: Tensor, head_VD: Tensor, ptr_I1: Tensor, tok_M: Tensor, bias_V: Tensor | None
) -> Tensor:
    """See verbalizer.catalogue_scores: fp32 (B, I)."""
    n_items = len(ptr_I1) - 1
    score_BI = torch.empty(len(x_BD), n_items)
    for b, n, logit_VL in by_users(x_BD, head_VD, bias_V):
        call("catalogue", logit_VL, ptr_I1, tok_M, n_items, n, score_BI[b:])
    return score_BI


def catalogue_topk(
    x_BD: Tensor,
    head_VD: Tensor,
    ptr_I1: Tensor,
    tok_M: Tensor,
    k: int,
    seen_BS: Tensor,
    bias_V: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See verbalizer.catalogue_topk: ids int64 (B, k) and scores fp32 (B, k)."""
    n_items, S = len(ptr_I1) - 1, seen_BS.shape[1]
    id_Bk = torch.empty(len(x_BD), k, dtype=torch.int64)
    score_Bk = torch.empty(len(x_BD), k)
    for b, n, logit_VL in by_users(x_BD, head_VD, bias_V):
        best = (seen_BS[b:], S, id_Bk[b:], score_Bk[b:])
        call("topk", logit_VL, ptr_I1, tok_M, n_items, n, k, *best)
    return id_Bk, score_Bk


# --------------------- a decoder's layer, forward only (delrec.lm.passes.pass_fused); fp32 and bf16


def rms_norm(x_MD: Tensor, add_MD: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight, after x += add in place (None: nothing to add).

    All contiguous, one dtype.
    """
    out_MD = torch.empty_like(x_MD)
    call("rms_norm", dtype(x_MD), x_MD, add_MD, weight_D, ctypes.c_float(eps), out_MD, *x_MD.shape)
    return out_MD


def silu_mul(gate_MF: Tensor, up_MF: Tensor) -> Tensor:
    """silu(gate) * up, in the place of gate."""
    call("silu_mul", dtype(gate_MF), gate_MF, up_MF, gate_MF.numel())
    return gate_MF


def attention(
    q_MHd: Tensor,
    k_MGd: Tensor,
    v_MGd: Tensor,
    cos_Md: Tensor,
    sin_Md: Tensor,
    past: tuple[Tensor, Tensor] | None,
    seg_M: Tensor,
    ptr: Tensor,
    scale: float,
) -> Tensor:
    """Attention of rows one behind the other: (M, H, d). q, k, v as projected; past: keys and
    values (1, G, kept, d) of the prefix that all see, or None; seg int32 [M]: 0 for a row's tail,
    which all of the row see as far as it stands before them, c for title c, which only sees itself
    behind it; ptr int64 [rows + 1].
    """
    out_MHd = torch.empty_like(q_MHd)
    _, H, d = q_MHd.shape
    kept = 0 if past is None else past[0].shape[2]
    tokens = (q_MHd, k_MGd, v_MGd, cos_Md, sin_Md)
    prefix = (*(past or (None, None)), kept)
    sizes = (len(ptr) - 1, H, k_MGd.shape[1], d)
    as_float = ctypes.c_float(scale)
    call("attention", dtype(q_MHd), *tokens, *prefix, seg_M, ptr, *sizes, as_float, out_MHd)
    return out_MHd
