"""The verbalizer in Triton.

Compiled for this machine's GPU on first use; run by Triton's interpreter on a CPU where
TRITON_INTERPRET=1.

Formulas and shapes are those of reference.py. Floors: candidate scores read the head's rows of the
candidates' tokens once, sum(n) * D * bytes; the catalogue reads 4 bytes a token of all titles, and
4 * BLOCK_B bytes of logits a token out of the second-level cache. Sums are fp32 and every output
has one writer: no atomics, the same bits in every run.

The kernels (@triton.jit) have no type hints: Triton would take a hint as the type to compile for.
Their parameters in capitals are pointers to tensors, or constants (tl.constexpr).
"""

import os

# Triton 3.10 changes its default; the numbers shall not move with it
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW = 128  # programs that leave most of a card idle: such a launch gets wider ones


def blocks(T: int, D: int, dtype: torch.dtype, programs: int) -> dict[str, int]:
    """Tile of titles' rows, tokens x width, and warps of a program.

    A thread asks for eight times 16 bytes at once (kernels/compiled.py shows it). Where programs
    are few, a program asks for a whole row of a tile at once, with more warps.
    """
    wide = (1 if dtype == torch.float32 else 2) * (256 if programs > FEW else 1024)
    width = min(wide, max(16, triton.next_power_of_2(D)))
    tokens = min(16, triton.next_power_of_2(T))
    piece = 8 * 16 // dtype.itemsize * 32  # numbers that a warp asks for at once
    warps = min(16, max(4, tokens * width // piece))
    return {"BLOCK_T": tokens, "BLOCK_D": width, "num_warps": warps}


# ---------------------------------------------------------------- candidate scores


@triton.jit
def scores_kernel(
    X, W, TOK, LEN, S, C, T, D, stride_w, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program per (b, c): products with x summed along the width for each token, over the
    tokens at the end. A sum over tokens in the loop would let warps wait for each other.
    """
    # int64 before it is multiplied by a stride
    bc = tl.program_id(0).to(tl.int64)
    n = tl.load(LEN + bc)
    acc = tl.zeros((BLOCK_T,), tl.float32)
    for t0 in range(0, n, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        tok = tl.load(TOK + bc * T + t, mask=t < n, other=0).to(tl.int64)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            x = tl.load(X + (bc // C) * D + d, mask=d < D, other=0.0).to(tl.float32)
            w = tl.load(
                W + tok[:, None] * stride_w + d[None, :],
                mask=(t < n)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            acc += tl.sum(x[None, :] * w.to(tl.float32), 1)
    tl.store(S + bc, tl.sum(acc, 0) / tl.maximum(n, 1).to(tl.float32))


@triton.jit
def scores_dx_kernel(
    G, W, TOK, LEN, DX, B, C, T, D, stride_w, share, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program per (b, block of D, share of b's C * T tokens): its part of
    dx = sum_c g/n sum_t head[tok], written once.
    """
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for p0 in range(part * share, (part + 1) * share, BLOCK_T):
        p = p0 + tl.arange(0, BLOCK_T)
        bc = b * C + p // T
        n = tl.load(LEN + bc, mask=p < C * T, other=0)
        inside = p % T < n
        g = tl.load(G + bc, mask=inside, other=0.0) / tl.maximum(n, 1).to(tl.float32)
        tok = tl.load(TOK + b * C * T + p, mask=inside, other=0).to(tl.int64)
        w = tl.load(
            W + tok[:, None] * stride_w + d[None, :],
            mask=inside[:, None] & (d < D)[None, :],
            other=0.0,
        )
        acc += g[:, None] * w.to(tl.float32)
    tl.store(DX + (part * B + b) * D + d, tl.sum(acc, 0), mask=d < D)


def scores(
    x_BD: Tensor, head_VD: Tensor, tok_BCT: Tensor, n_BC: Tensor, gradient: bool
) -> tuple[Tensor, None]:
    """score_BC without the bias, and nothing kept for backward, which gathers again: bytes are
    cheap here, memory is not.
    """
    B, C, T = tok_BCT.shape
    score_BC = torch.empty(B, C, device=x_BD.device)
    scores_kernel[(B * C,)](
        x_BD,
        head_VD,
        tok_BCT,
        n_BC,
        score_BC,
        C,
        T,
        x_BD.shape[1],
        head_VD.stride(0),
        **blocks(T, x_BD.shape[1], head_VD.dtype, B * C),
    )
    return score_BC, None


def scores_dx(g_BC: Tensor, _: None, head_VD: Tensor, tok_BCT: Tensor, n_BC: Tensor) -> Tensor:
    """dx[b] = sum_c g[b, c] / n sum_t head[tok[b, c, t]]: fp32 (B, D).

    Where B is small, the tokens of a prompt are shared by several programs, whose sums are added.
    """
    B, C, T = tok_BCT.shape
    D = head_VD.shape[1]
    width = min(128 if head_VD.dtype == torch.float32 else 256, max(16, triton.next_power_of_2(D)))
    programs, steps = B * triton.cdiv(D, width), triton.cdiv(C * T, 16)
    share = triton.cdiv(steps, min(steps, max(1, 2 * FEW // programs)))  # steps of a program
    parts = triton.cdiv(steps, share)
    dx_SBD = torch.empty(parts, B, D, device=g_BC.device)
    scores_dx_kernel[(B, triton.cdiv(D, width), parts)](
        g_BC,
        head_VD,
        tok_BCT,
        n_BC,
        dx_SBD,
        B,
        C,
        T,
        D,
        head_VD.stride(0),
        share * 16,
        BLOCK_T=16,
        BLOCK_D=width,
    )
    return dx_SBD[0] if parts == 1 else dx_SBD.sum(0)


# ---------------------------------------------------------------- title likelihood


@triton.jit
def logits_at(L, BIAS, j, there, other, HAS_BIAS: tl.constexpr):
    """The logits j of a row, with their bias; `other` where nothing is there."""
    logit = tl.load(L + j, mask=there, other=other)
    if HAS_BIAS:
        logit += tl.load(BIAS + j, mask=there, other=0.0)
    return logit


@triton.jit
def absorb_kernel(
    L,
    BIAS,
    TOK,
    M,
    S,
    PICK,
    SHRINK,
    LOGP,
    P,
    v0,
    n,
    stride_l,
    HAS_BIAS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program per row: takes a tile of its logits (tokens v0 .. v0+n) into the running maximum
    M and sum S of exponentials, keeps the logit PICK of the row's own token, and writes the log
    probability LOGP so far, which the last tile makes right. For the gradient it writes
    P = e^(l - M), and SHRINK, by what the sums so far are multiplied.
    """
    i = tl.program_id(0).to(tl.int64)
    # all that this program writes at its end is read before its warps meet for the first time
    old = tl.load(M + i, mask=v0 > 0, other=float("-inf"))
    before = tl.load(S + i, mask=v0 > 0, other=0.0)
    at = tl.load(TOK + i) - v0
    own = tl.load(PICK + i, mask=at < 0, other=0.0)
    # a strip of a few rows, so that a thread's four loads are asked for together; maxima and sums
    # stay in the threads until the end, where warps wait for each other once
    strip = tl.arange(0, BLOCK // WIDE)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    tops = tl.full((WIDE,), float("-inf"), tl.float32)
    for j0 in range(0, n, BLOCK):
        j = j0 + strip
        logit = logits_at(L + i * stride_l, BIAS + v0, j, j < n, float("-inf"), HAS_BIAS)
        tops = tl.maximum(tops, tl.max(logit, 0))
    top = tl.maximum(old, tl.max(tops, 0))
    totals = tl.zeros((WIDE,), tl.float32)
    for j0 in range(0, n, BLOCK):
        j = j0 + strip
        logit = logits_at(L + i * stride_l, BIAS + v0, j, j < n, float("-inf"), HAS_BIAS)
        p = tl.exp(logit - top)
        totals += tl.sum(p, 0)
        if GRADIENT:
            tl.store(P + i * stride_l + j, p, mask=j < n)
    shrink = tl.exp(old - top)
    here = (at >= 0) & (at < n)
    own += logits_at(L + i * stride_l, BIAS + v0, at, here, 0.0, HAS_BIAS)
    total = before * shrink + tl.sum(totals, 0)
    tl.store(PICK + i, own)
    tl.store(S + i, total)
    tl.store(M + i, top)
    tl.store(LOGP + i, own - (top + tl.log(total)))
    if GRADIENT:
        tl.store(SHRINK + i, shrink)


CELLS = 2**24  # logits of a tile that is made wide, 64 MB: launching costs more where rows are few


def strip(rows: int, words: int, gradient: bool) -> dict[str, int]:
    """Logits of a row at a time, those side by side, and warps of a program: more for each row
    where rows are few. A thread has four logits next to each other, or eight where it writes as
    many 16-bit probabilities: sums down the strip then stay in the thread.
    """
    warps = 4 if rows > 2 * FEW else 16
    block = min(512 * warps, triton.next_power_of_2(words))
    return {"BLOCK": block, "WIDE": max(1, block // (2 if gradient else 4)), "num_warps": warps}


def words_at_once(rows: int, V: int) -> int:
    """Words of the vocabulary in a tile of the logits: all where rows are few. A multiple of 16, so
    that every row begins where loads are wide.
    """
    most = max(8192, CELLS // max(rows, 1) // 8192 * 8192)
    return min(most, max(16, V // 16 * 16))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with fp32 sums and an fp32 result, at the speed of a's dtype."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def log_probs(
    x_ND: Tensor,
    head_VD: Tensor,
    tok_N: Tensor,
    bias_V: Tensor | None,
    gradient: bool,
    rows: int = 4096,
    tile: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(head x[i] + bias)[tok[i]]: fp32 (N,); with gradient also head[tok[i]] - sum_v
    P(v) head[v]: fp32 (N, D), else None.

    One pass over the head, as attention makes over its keys: cuBLAS makes a rows x tile piece of
    the logits, the kernel folds it into running sums, and the same piece as probabilities times the
    same tile of the head gives the gradient. One tile: two launches, fewer than full logits take.
    """
    N, D = x_ND.shape
    V, device = len(head_VD), x_ND.device
    tile = tile or words_at_once(N, V)
    logp_N = torch.empty(N, device=device)
    diff_ND = torch.empty(N, D, device=device) if gradient else None
    for i in range(0, N, rows):
        x, tok = x_ND[i : i + rows], tok_N[i : i + rows]
        m, s, pick, shrink = torch.empty(4, len(x), device=device)
        E = None
        for v0 in range(0, V, tile):
            head = head_VD[v0 : v0 + tile]
            logit = product(x, head.t())
            p = torch.empty(logit.shape, dtype=x.dtype, device=device) if gradient else logit
            absorb_kernel[(len(x),)](
                logit,
                logit if bias_V is None else bias_V,
                tok,
                m,
                s,
                pick,
                shrink,
                logp_N[i:],
                p,
                v0,
                len(head),
                logit.stride(0),
                HAS_BIAS=bias_V is not None,
                GRADIENT=gradient,
                **strip(len(x), len(head), gradient),
            )
            if gradient:
                part = product(p, head)
                E = part if E is None else E.mul_(shrink[:, None]).add_(part)
            del logit, p  # before the next tile is made: one exists at a time
        if gradient:
            diff_ND[i : i + rows] = head_VD[tok.long()].float() - E / s[:, None]
    return logp_N, diff_ND


# ---------------------------------------------------------------- the catalogue


@triton.jit
def topk_kernel(
    L,
    PTR,
    TOK,
    SEEN,
    KEYS,
    n_items,
    S,
    tiles,
    BLOCK_I: tl.constexpr,
    BLOCK_B: tl.constexpr,
    K: tl.constexpr,
):
    """One program per (block of items, tile of users): the mean logits of the items, and the K best
    of them as sortable keys.

    A key is the score's bits in an order-preserving int32 (high word) and 2^31 - 1 - item (low
    word): equal scores rank by lower id.
    """
    lo, tile = tl.program_id(0) * BLOCK_I, tl.program_id(1).to(tl.int64)
    i, b = lo + tl.arange(0, BLOCK_I), tile * BLOCK_B + tl.arange(0, BLOCK_B)
    start = tl.load(PTR + i, mask=i < n_items, other=0)
    n = (tl.load(PTR + i + 1, mask=i < n_items, other=0) - start).to(tl.int32)
    stride_l = tiles * BLOCK_B  # so the compiler knows that rows begin at whole blocks
    acc = tl.zeros((BLOCK_B, BLOCK_I), tl.float32)
    for t in range(0, tl.max(n, 0)):
        tok = tl.load(TOK + start + t, mask=t < n, other=0).to(tl.int64)
        acc += tl.load(L + tok[None, :] * stride_l + b[:, None], mask=(t < n)[None, :], other=0.0)
    score = acc / tl.maximum(n, 1).to(tl.float32)[None, :]
    score = tl.where(score == 0, 0.0, score)  # -0 is 0, also among the bits
    score = tl.where((n > 0)[None, :], score, float("-inf"))
    for s in range(0, S):
        seen = tl.load(SEEN + b * S + s)
        if tl.max(((seen >= lo) & (seen < lo + BLOCK_I)).to(tl.int32), 0) > 0:
            score = tl.where(seen[:, None] == i[None, :], float("-inf"), score)
    bits = score.to(tl.int32, bitcast=True)
    high = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    key = (high << 32) | (0x7FFFFFFF - i).to(tl.int64)[None, :]
    best = tl.topk(key, K)
    at = (b[:, None] * tl.num_programs(0) + tl.program_id(0)) * K + tl.arange(0, K)[None, :]
    tl.store(KEYS + at, best)


BLOCK_I, BLOCK_B = 256, 8  # items and users of a program of topk_kernel


def catalogue_topk(
    x_BD: Tensor,
    head_VD: Tensor,
    ptr_I1: Tensor,
    tok_M: Tensor,
    k: int,
    seen_BS: Tensor,
    bias_V: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See verbalizer.catalogue_topk. (B, I) is never written: K keys per block of items are, and
    one top-k over them follows.
    """
    B, n_items = len(x_BD), len(ptr_I1) - 1
    K = triton.next_power_of_2(k)
    # tl.topk sorts: not worth it for long lists
    if K > 64 or n_items < BLOCK_I:
        from . import reference

        return reference.catalogue_topk(x_BD, head_VD, ptr_I1, tok_M, k, seen_BS, bias_V)
    wide = triton.cdiv(B, BLOCK_B) * BLOCK_B
    x_BD = torch.cat([x_BD, x_BD.new_zeros(wide - B, x_BD.shape[1])])
    seen_BS = torch.cat([seen_BS, seen_BS.new_full((wide - B, seen_BS.shape[1]), -1)])
    # users innermost: one token fetches its BLOCK_B neighbours
    logit_VB = product(head_VD, x_BD.t())
    logit_VB = logit_VB if bias_V is None else logit_VB.add_(bias_V[:, None])
    parts = triton.cdiv(n_items, BLOCK_I)
    keys = torch.empty(wide, parts * K, dtype=torch.int64, device=x_BD.device)
    topk_kernel[(parts, wide // BLOCK_B)](
        logit_VB,
        ptr_I1,
        tok_M,
        seen_BS,
        keys,
        n_items,
        seen_BS.shape[1],
        wide // BLOCK_B,
        BLOCK_I=BLOCK_I,
        BLOCK_B=BLOCK_B,
        K=K,
    )
    best_Bk = keys[:B].topk(min(k, parts * K), dim=1).values
    high = (best_Bk >> 32).int()
    score_Bk = torch.where(high < 0, high ^ 0x7FFFFFFF, high).view(torch.float32)
    id_Bk = (0x7FFFFFFF - (best_Bk & 0x7FFFFFFF)).masked_fill(score_Bk == -torch.inf, -1)
    more = k - id_Bk.shape[1]
    id_Bk = torch.nn.functional.pad(id_Bk, (0, more), value=-1)
    return id_Bk, torch.nn.functional.pad(score_Bk, (0, more), value=-torch.inf)
