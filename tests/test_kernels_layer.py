"""A decoder's layer in C++ against fp64."""

import numpy as np
import pytest
import torch

from delrec.kernels import cpu


def rows_of_segments(shape):
    """[(tail, [title lengths])] -> segment of each token, ptr."""
    rows = [
        [0] * m + [c + 1 for c, n in enumerate(titles) for _ in range(n)] for m, titles in shape
    ]
    return torch.tensor(sum(rows, []), dtype=torch.int32), torch.tensor(
        np.cumsum([0, *map(len, rows)])
    )


def plain_attention(q, k, v, cos, sin, past, seg, ptr, scale):
    """In fp64, a row and a head at a time, under a mask."""
    q, k, v, cos, sin = (t.double() for t in (q, k, v, cos, sin))

    def turn(x):
        return (
            x * cos[:, None]
            + torch.cat([-x[..., x.shape[2] // 2 :], x[..., : x.shape[2] // 2]], 2) * sin[:, None]
        )

    q, k, out = turn(q), turn(k), torch.zeros_like(q)
    for lo, hi in zip(ptr[:-1].tolist(), ptr[1:].tolist()):
        s = seg[lo:hi]
        sees = ((s[None] == 0) | (s[None] == s[:, None])).tril()
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            keys, values, mask = k[lo:hi, g], v[lo:hi, g], sees
            if past is not None:
                keys, values = (
                    torch.cat([p[0, g].double(), x]) for p, x in zip(past, (keys, values))
                )
                mask = torch.cat([torch.ones(hi - lo, past[0].shape[2], dtype=torch.bool), sees], 1)
            out[lo:hi, h] = (q[lo:hi, h] @ keys.T * scale).masked_fill(~mask, -torch.inf).softmax(
                1
            ) @ values
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "H, G, d, kept, shape",
    [
        (9, 3, 64, 110, [(30, [3, 5, 1]), (7, []), (1, [2, 2])]),
        (4, 4, 16, 0, [(5, [4]), (13, [])]),
        (8, 1, 128, 3, [(60, [10] * 5)]),
        (2, 1, 6, 5, [(9, [2])]),
        (3, 3, 2, 0, [(1, [])]),
        (6, 2, 80, 1, [(150, [60, 1]), (49, [])]),
    ],
)
def test_attention_of_packed_rows(dtype, H, G, d, kept, shape):
    if not cpu.library():
        pytest.skip("no C++ compiler")
    g = torch.Generator().manual_seed(0)
    seg, ptr = rows_of_segments(shape)

    def draw(*size):
        return torch.randn(*size, generator=g).to(dtype)

    q = draw(len(seg), H, d) * 2
    k = draw(len(seg), G, d)
    v = draw(len(seg), G, d)
    angle = torch.rand(len(seg), d // 2, generator=g) * 6
    cos, sin = (torch.cat([f(angle)] * 2, 1).to(dtype) for f in (torch.cos, torch.sin))
    past = (draw(1, G, kept, d), draw(1, G, kept, d)) if kept else None
    want = plain_attention(q, k, v, cos, sin, past, seg, ptr, d**-0.5)
    got = cpu.attention(q, k, v, cos, sin, past, seg, ptr, d**-0.5)
    torch.testing.assert_close(
        got.double(),
        want,
        rtol=1e-5 if dtype == torch.float32 else 2e-2,
        atol=1e-5 if dtype == torch.float32 else 2e-2,
    )
    threads = torch.get_num_threads()
    # a sum belongs to one thread, whatever their number
    try:
        for n in (1, 5):
            torch.set_num_threads(n)
            assert torch.equal(cpu.attention(q, k, v, cos, sin, past, seg, ptr, d**-0.5), got)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_norms_and_gates(dtype, tolerance):
    if not cpu.library():
        pytest.skip("no C++ compiler")
    g = torch.Generator().manual_seed(0)
    x, add, w = (torch.randn(*size, generator=g).to(dtype) for size in ((13, 70), (13, 70), (70,)))
    for more in (None, add):
        y = x.clone()
        out = cpu.rms_norm(y, more, w, 1e-5)
        total = x if more is None else x + add
        assert torch.equal(y, total)
        torch.testing.assert_close(
            out.double(),
            torch.nn.functional.rms_norm(total.double(), (70,), w.double(), 1e-5),
            rtol=tolerance,
            atol=1e-6,
        )
    gate, up = (
        (torch.randn(5003, generator=g) * 20).to(dtype),
        torch.randn(5003, generator=g).to(dtype),
    )
    gate[:2] = torch.tensor([-200.0, 200.0])
    want = torch.nn.functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(cpu.silu_mul(gate, up).double(), want, rtol=tolerance, atol=1e-6)
