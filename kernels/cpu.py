"""The C++ loops of cpu.cpp: built once with the machine's own compiler, kept under the user's cache
folder, called through ctypes.

A plain shared library of 400 lines: no torch headers, so it builds in seconds and serves every
torch version. It is compiled for this very CPU, so the CPU's features are part of the name it is
kept under.
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
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC"]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def library():
    """The loaded library, or None (said once, in one line) where it cannot be built; then the torch
    reference does the work.
    """
    compiler = (
        shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++") or shutil.which("clang++")
    )
    if compiler is None:
        return none("no C++ compiler (g++) found")
    cpu = (
        next(
            (
                line
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith(("flags", "Features"))
            ),
            "",
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    key = hashlib.sha256(
        "\n".join([SOURCE.read_text(), *FLAGS, compiler, platform.machine(), cpu]).encode()
    ).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "delrec" / "kernels"
    path = cache / f"verbalizer-{key}.so"
    try:
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            # renamed when whole: processes that build at once do not meet
            with tempfile.TemporaryDirectory(dir=cache) as room:
                built = subprocess.run(
                    [compiler, *FLAGS, str(SOURCE), "-o", f"{room}/v.so"],
                    capture_output=True,
                    text=True,
                )
                if built.returncode:
                    return none(
                        f"{compiler} failed: "
                        f"{(built.stderr.strip().splitlines() or ['no message'])[-1][:200]}"
                    )
                os.replace(f"{room}/v.so", path)
        lib = ctypes.CDLL(str(path))
    except OSError as e:
        return none(str(e))
    for name in (
        "scores",
        "pool",
        "likelihood",
        "logits",
        "catalogue",
        "topk",
        "rms_norm",
        "silu_mul",
        "attention",
    ):
        getattr(lib, f"verbalizer_{name}").restype = None
    return lib


def none(why):
    print(
        f"kernels: {why}; the verbalizer runs on plain torch (the same numbers, slower and with "
        "more memory)",
        file=sys.stderr,
        flush=True,
    )


def call(name, *args):
    """Tensors go as pointers, integers as int64, None as a null pointer.

    As many threads as torch has: its OpenMP need not be the library's.
    """

    def c(a):
        return (
            ctypes.c_void_p(a.data_ptr())
            if isinstance(a, torch.Tensor)
            else ctypes.c_int64(a)
            if isinstance(a, int)
            else a
        )

    library().verbalizer_threads(ctypes.c_int(torch.get_num_threads()))
    return getattr(library(), f"verbalizer_{name}")(*map(c, args))


def dtype(t):
    return ctypes.c_int(DTYPES[t.dtype])


def titles_fit(tok_BCT, n_BC, V):
    """True if every length is in 0..T and every token before a title's end in 0..V-1. Both int32
    and contiguous.
    """
    return bool(call("titles_fit", tok_BCT, n_BC, n_BC.numel(), tok_BCT.shape[2], V))


def scores(x_BD, head_VD, tok_BCT, n_BC, gradient):
    """score_BC without the bias, and what backward needs: with gradient the mean rows (B, C, D)
    fp32, else None. tok and n int32, all but the head contiguous.
    """
    B, C, T = tok_BCT.shape
    if gradient:
        row_BCD = torch.empty(B, C, x_BD.shape[1])
        call(
            "pool",
            dtype(head_VD),
            head_VD,
            head_VD.stride(0),
            tok_BCT,
            n_BC,
            row_BCD,
            B * C,
            T,
            x_BD.shape[1],
        )
        return (row_BCD @ x_BD.float()[..., None])[..., 0], row_BCD
    score_BC = torch.empty(B, C)
    call(
        "scores",
        dtype(head_VD),
        x_BD,
        head_VD,
        head_VD.stride(0),
        tok_BCT,
        n_BC,
        score_BC,
        B,
        C,
        T,
        x_BD.shape[1],
    )
    return score_BC, None


def scores_dx(g_BC, row_BCD, head_VD, tok_BCT, n_BC):
    """dx[b] = sum_c g[b, c] row[b, c]: fp32 (B, D)."""
    return (g_BC[:, None] @ row_BCD)[:, 0]


def log_probs(x_ND, head_VD, tok_N, bias_V, gradient):
    """log softmax(head x[i] + bias)[tok[i]]: fp32 (N,); with gradient also its derivative to x[i]:
    fp32 (N, D), else None.
    """
    N, D = x_ND.shape
    logp_N, diff_ND = torch.empty(N), torch.empty(N, D) if gradient else None
    call(
        "likelihood",
        dtype(head_VD),
        x_ND,
        head_VD,
        head_VD.stride(0),
        bias_V,
        tok_N,
        logp_N,
        diff_ND,
        N,
        head_VD.shape[0],
        D,
    )
    return logp_N, diff_ND


def by_users(x_BD, head_VD, bias_V):
    """The logits of a few users at a time, users innermost: (first user, how many, logit_VL)."""
    V, lanes, tables = len(head_VD), library().verbalizer_lanes(), library().verbalizer_tables()
    room = torch.empty(min(tables, -(-len(x_BD) // lanes)), V, lanes)
    for b in range(0, len(x_BD), tables * lanes):
        part = x_BD[b : b + tables * lanes]
        call(
            "logits",
            dtype(head_VD),
            part,
            head_VD,
            head_VD.stride(0),
            bias_V,
            room,
            len(part),
            V,
            x_BD.shape[1],
        )
        for i in range(0, len(part), lanes):
            yield b + i, min(lanes, len(part) - i), room[i // lanes]


def catalogue_scores(x_BD, head_VD, ptr_I1, tok_M, bias_V):
    score_BI = torch.empty(len(x_BD), len(ptr_I1) - 1)
    for b, n, logit_VL in by_users(x_BD, head_VD, bias_V):
        call("catalogue", logit_VL, ptr_I1, tok_M, len(ptr_I1) - 1, n, score_BI[b:])
    return score_BI


def catalogue_topk(x_BD, head_VD, ptr_I1, tok_M, k, seen_BS, bias_V):
    id_Bk, score_Bk = torch.empty(len(x_BD), k, dtype=torch.int64), torch.empty(len(x_BD), k)
    for b, n, logit_VL in by_users(x_BD, head_VD, bias_V):
        call(
            "topk",
            logit_VL,
            ptr_I1,
            tok_M,
            len(ptr_I1) - 1,
            n,
            k,
            seen_BS[b:],
            seen_BS.shape[1],
            id_Bk[b:],
            score_Bk[b:],
        )
    return id_Bk, score_Bk


# ------------------------------ a decoder's layer, forward only (lm.py's pass_fused); fp32 and bf16


def rms_norm(x_MD, add_MD, weight_D, eps):
    """x += add in place (None: nothing to add), then x / sqrt(mean x^2 + eps) * weight.

    All contiguous, one dtype.
    """
    out_MD = torch.empty_like(x_MD)
    call("rms_norm", dtype(x_MD), x_MD, add_MD, weight_D, ctypes.c_float(eps), out_MD, *x_MD.shape)
    return out_MD


def silu_mul(gate_MF, up_MF):
    """gate = silu(gate) * up, in place."""
    call("silu_mul", dtype(gate_MF), gate_MF, up_MF, gate_MF.numel())
    return gate_MF


def attention(q_MHd, k_MGd, v_MGd, cos_Md, sin_Md, past, seg_M, ptr, scale):
    """Attention of rows one behind the other: (M, H, d). q, k, v as projected; past: keys and
    values (1, G, kept, d) of the prefix that all see, or None; seg int32 [M]: 0 for a row's tail,
    which all of the row see as far as it stands before them, c for title c, which only sees itself
    behind it; ptr int64 [rows + 1].
    """
    out_MHd, (_, H, d) = torch.empty_like(q_MHd), q_MHd.shape
    kept = 0 if past is None else past[0].shape[2]
    call(
        "attention",
        dtype(q_MHd),
        q_MHd,
        k_MGd,
        v_MGd,
        cos_Md,
        sin_Md,
        *(past or (None, None)),
        kept,
        seg_M,
        ptr,
        len(ptr) - 1,
        H,
        k_MGd.shape[1],
        d,
        ctypes.c_float(scale),
        out_MHd,
    )
    return out_MHd
