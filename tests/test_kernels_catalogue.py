"""The whole catalogue: scores and the best titles, against loops in fp64."""

import pytest
import torch
from kernel_cases import DTYPES, NothingFetched, catalogue, close, inputs, loop_scores, poisoned

pytest_plugins = ["kernel_fixtures"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_catalogue_scores_equal_the_candidates_of_the_same_titles(ops, bias, dtype):
    x, head, ptr, tok, b = catalogue(dtype=dtype)
    b = b if bias else None
    n = ptr.diff()
    padded = torch.zeros(len(n), int(n.max()), dtype=torch.long)
    for i in range(len(n)):
        padded[i, : n[i]] = tok[ptr[i] : ptr[i + 1]]
    want = loop_scores(
        x.double(),
        head.double(),
        padded.expand(3, -1, -1),
        n.expand(3, -1),
        None if b is None else b.double(),
    )
    close(ops.catalogue_scores(x, head, ptr, tok, b), want)
    # a part of the catalogue
    close(ops.catalogue_scores(x, head, ptr[2:6], tok, b), want[:, 2:5])
    with NothingFetched():  # as the LM's verbalizers call it
        whole = ops.catalogue_scores(x, head, ptr, tok, b, known=True)
        part = ops.catalogue_scores(x, head, ptr[2:6], tok, b, known=True)
    close(whole, want)
    close(part, want[:, 2:5])


def test_gaps_between_the_head_s_rows_are_not_read(ops):
    x, head, ptr, tok, b = catalogue(lengths=(2, 1) * 130)  # more items than a block
    with_gaps = poisoned(head)[: len(head)]
    close(
        ops.catalogue_scores(x, with_gaps, ptr, tok, b),
        ops.catalogue_scores(x, head, ptr, tok, b).double(),
    )
    _, best = ops.catalogue_topk(x, with_gaps, ptr, tok, 5, bias_V=b)
    _, want = ops.catalogue_topk(x, head, ptr, tok, 5, bias_V=b)
    close(best, want.double())


def test_many_equal_titles_are_listed_by_id(ops):
    # 600 items of three titles: a sort that is not stable mixes them up
    x, head, *_ = inputs(B=2)
    tok = torch.arange(600) % 3
    for k in (450, 50):
        ids, best = ops.catalogue_topk(x, head, torch.arange(601), tok, k)
        for row in range(2):
            score = head[:3] @ x[row]
            order = sorted(range(600), key=lambda i: (-score[i % 3].item(), i))
            assert ids[row].tolist() == order[:k]


@pytest.mark.parametrize("B", [1, 19, 70])
def test_every_device_lists_the_same_items(ops, B):
    # whole numbers: sums are exact, ties are everywhere, and -0 and 0 are one number
    if ops.name == "interpreted" and B > 19:
        pytest.skip("half a minute in the interpreter, and no other case")
    n_items = 100 if ops.name == "interpreted" and B > 1 else 400
    g = torch.Generator().manual_seed(B)
    head, x = (
        torch.randint(-2, 3, (40, 6), generator=g).float(),
        torch.randint(-2, 3, (B, 6), generator=g).float(),
    )
    ptr = torch.cat(
        [torch.zeros(1, dtype=torch.long), torch.randint(0, 4, (n_items,), generator=g).cumsum(0)]
    )
    tok, seen = (
        torch.randint(0, 40, (int(ptr[-1]),), generator=g),
        torch.randint(-1, n_items, (B, 30), generator=g),
    )
    ids, best = ops.catalogue_topk(x, head, ptr, tok, 20, seen)
    score = (x @ head.t())[:, tok].double()
    for row in range(B):
        mean = [
            score[row, a:b].mean().item() if b > a else None
            for a, b in zip(ptr[:-1].tolist(), ptr[1:].tolist())
        ]
        left = [i for i in range(n_items) if mean[i] is not None and i not in seen[row].tolist()]
        want = sorted(left, key=lambda i: (-torch.tensor(mean[i]).float().item(), i))[:20]
        assert ids[row].tolist() == want
        assert best[row].tolist() == pytest.approx([mean[i] for i in want], abs=1e-6)


def test_top_of_the_catalogue_leaves_out_what_was_seen_and_says_where_it_ends(ops):
    x, head, ptr, tok, b = catalogue()
    score = ops.catalogue_scores(x, head, ptr, tok, b)
    assert torch.equal(score[:, 1], score[:, 4])
    seen = torch.tensor([[-1, -1], [3, -1], [5, 2]])
    ids, best = ops.catalogue_topk(x, head, ptr, tok, 7, seen, b)
    assert ids.dtype == torch.int64 and ids.shape == best.shape == (3, 7)
    for row in range(3):
        want = sorted(
            (i for i in range(1, 6) if i not in seen[row].tolist()),
            key=lambda i: (-score[row, i].item(), i),
        )
        # item 0 has no title
        assert ids[row].tolist() == want + [-1] * (7 - len(want))
        assert (
            torch.equal(best[row, : len(want)], score[row, want])
            and (best[row, len(want) :] == -torch.inf).all()
        )
    ids, best = ops.catalogue_topk(x, head, ptr, tok, 2, bias_V=b)
    assert torch.equal(best, score[:, 1:].topk(2, 1).values)
