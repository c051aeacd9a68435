"""The verbalizer's functions against loops in fp64: values and gradients, for the reference and for whatever kernels/ offers in its place."""
import pytest
import torch

import kernels
from kernels import reference

BOTH = pytest.mark.parametrize("ops", [reference, kernels], ids=["reference", "public"])


def close(got, true, tol=2e-6):
    """fp32 against fp64, relative to the largest number there is."""
    assert got.dtype == torch.float32 and got.shape == true.shape
    assert (got.double() - true).abs().max() <= tol * true.abs().max().clamp(min=1)


def inputs(seed=0, B=3, C=7, T=5, V=23, D=13, bias=True):
    """Ragged titles: some empty, some of one token, tokens repeated; places beyond a title's end hold tokens that must not count."""
    g = torch.Generator().manual_seed(seed)
    x, head, b = torch.randn(B, D, generator=g), torch.randn(V, D, generator=g), torch.randn(V, generator=g)
    tok, n = torch.randint(0, V, (B, C, T), generator=g), torch.randint(0, T + 1, (B, C), generator=g)
    n[0, 0], n[0, 1], n[0, 2] = 0, 1, T
    tok[0, 2] = tok[0, 2, 0]                             # one token five times
    return x, head, tok, n, b if bias else None


def loop_scores(x, head, tok, n, bias):
    """mean over t < n of head[tok] . x + bias[tok], one number at a time."""
    rows = []
    for b in range(tok.shape[0]):
        for c in range(tok.shape[1]):
            logits = [head[v] @ x[b] + (0 if bias is None else bias[v]) for v in tok[b, c, :n[b, c]].tolist()]
            rows.append(sum(logits) / len(logits) if logits else x.new_zeros(()))
    return torch.stack(rows).view(tok.shape[:2])


def fp64(*tensors):
    return [None if t is None else t.double().requires_grad_() for t in tensors]


def leaves(*tensors):
    return [None if t is None else t.clone().requires_grad_() for t in tensors]


# ---------------------------------------------------------------- mean logits of candidates

@BOTH
@pytest.mark.parametrize("bias", [True, False])
def test_candidate_scores_and_gradients_equal_the_loop(ops, bias):
    x, head, tok, n, b = inputs(bias=bias)
    upstream = torch.randn(tok.shape[:2], generator=torch.Generator().manual_seed(9))
    got, true = leaves(x, head, b), fp64(x, head, b)
    score, want = ops.candidate_scores(got[0], got[1], tok, n, got[2]), loop_scores(true[0], true[1], tok, n, true[2])
    close(score.detach(), want.detach())
    (score * upstream).sum().backward()
    (want * upstream.double()).sum().backward()
    for g, t in zip(got, true):
        if g is not None:
            close(g.grad, t.grad)


@BOTH
def test_empty_title_scores_zero_and_has_no_gradient(ops):
    x, head, tok, n, b = inputs()
    x, head, b = leaves(x, head, b)
    score = ops.candidate_scores(x, head, tok, torch.zeros_like(n), b)
    assert (score == 0).all()
    score.sum().backward()
    assert not x.grad.any() and not head.grad.any() and not b.grad.any()


@BOTH
def test_only_the_title_s_own_tokens_count(ops):
    x, head, tok, n, b = inputs()
    noise = torch.where(torch.arange(tok.shape[2]) < n[..., None], tok, (tok * 7 + 3) % len(head))
    assert not torch.equal(noise, tok)
    assert torch.equal(ops.candidate_scores(x, head, tok, n, b), ops.candidate_scores(x, head, noise, n, b))


@BOTH
def test_candidates_may_stand_in_any_order(ops):
    x, head, tok, n, b = inputs()
    order = torch.randperm(tok.shape[1], generator=torch.Generator().manual_seed(1))
    score = ops.candidate_scores(x, head, tok, n, b)
    assert torch.equal(ops.candidate_scores(x, head, tok[:, order], n[:, order], b), score[:, order])
    assert ops.candidate_scores(x[:1], head, tok[:1, :1], n[:1, :1], b).shape == (1, 1)


@BOTH
def test_bf16_is_pooled_no_worse_than_its_logits_round(ops):
    # against fp64 on the same bf16 numbers; the yardstick is the plain way in bf16: all logits, then their mean
    x, head, tok, n, b = inputs(B=8, C=15, T=12, V=300, D=128)
    x, head, b = x.bfloat16(), head.bfloat16(), b.bfloat16()
    want = loop_scores(x.double(), head.double(), tok, n, b.double())
    score = ops.candidate_scores(x, head, tok, n, b)
    logit_BV = torch.nn.functional.linear(x, head, b)
    real = torch.arange(tok.shape[2]) < n[..., None]
    plain = (logit_BV[torch.arange(8)[:, None, None], tok] * real).sum(2) / n.clamp(min=1)
    assert score.dtype == torch.float32
    assert (score - want).abs().max() <= (plain - want).abs().max() + 1e-5


# ---------------------------------------------------------------- log-likelihood of titles

def titles_of(seed=0, lengths=(3, 0, 1, 5, 2), V=23, D=13):
    g = torch.Generator().manual_seed(seed)
    N = sum(lengths)
    ptr = torch.tensor([0, *lengths]).cumsum(0)
    tok = torch.randint(0, V, (N,), generator=g)
    tok[3:6] = tok[3]                                    # a repeated token
    return torch.randn(N, D, generator=g), torch.randn(V, D, generator=g), tok, ptr, torch.randn(V, generator=g)


def loop_likelihood(x, head, tok, ptr, bias, normalise):
    out = []
    for a, b in zip(ptr[:-1].tolist(), ptr[1:].tolist()):
        logp = [(head @ x[i] + (0 if bias is None else bias)).log_softmax(0)[tok[i]] for i in range(a, b)]
        out.append(sum(logp) / (len(logp) if normalise else 1) if logp else x.new_zeros(()))
    return torch.stack(out)


@BOTH
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_title_likelihood_and_gradients_equal_the_loop(ops, bias, normalise):
    x, head, tok, ptr, b = titles_of()
    got, true = leaves(x, head, b if bias else None), fp64(x, head, b if bias else None)
    score, want = ops.title_likelihood(got[0], got[1], tok, ptr, got[2], normalise), loop_likelihood(true[0], true[1], tok, ptr, true[2], normalise)
    assert (want.detach()[[0, 2, 3, 4]] < 0).all() and score[1] == 0
    close(score.detach(), want.detach())
    upstream = torch.tensor([1., 5, -2, .5, 3])
    (score * upstream).sum().backward()
    (want * upstream.double()).sum().backward()
    for g, t in zip(got, true):
        if g is not None:
            close(g.grad, t.grad)


@BOTH
def test_chunks_change_neither_the_likelihood_nor_its_gradient(ops):
    results = []
    for chunk in (1, 4, 11, 1024):
        x, head, tok, ptr, b = titles_of()
        x, head, b = leaves(x, head, b)
        score = ops.title_likelihood(x, head, tok, ptr, b, chunk=chunk)
        (score * torch.tensor([1., 5, -2, .5, 3])).sum().backward()
        results.append((score.detach(), x.grad, head.grad, b.grad))
    for other in results[:-1]:
        for a, whole in zip(other, results[-1]):
            torch.testing.assert_close(a, whole, rtol=1e-5, atol=1e-5)


@BOTH
def test_likelihoods_of_all_continuations_sum_to_one(ops):
    _, head, _, _, b = titles_of()
    x = torch.randn(1, 13, generator=torch.Generator().manual_seed(4)).expand(23, -1)
    score = ops.title_likelihood(x, head, torch.arange(23), torch.arange(24), b)
    assert score.exp().sum().item() == pytest.approx(1, abs=1e-5)


@BOTH
def test_no_title_at_all(ops):
    x, head, tok, _, b = titles_of()
    assert ops.title_likelihood(x[:0], head, tok[:0], torch.zeros(3, dtype=torch.long), b).tolist() == [0, 0]


# ---------------------------------------------------------------- the whole catalogue

def catalogue(seed=0, lengths=(0, 2, 1, 4, 2, 3), V=23, D=13, B=3):
    """Item 4 has item 1's title; item 0 is the padding item without tokens."""
    x, head, tok, ptr, b = titles_of(seed, lengths, V, D)
    tok[ptr[4]:ptr[5]] = tok[ptr[1]:ptr[2]]
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed + 1)), head, ptr, tok, b


@BOTH
@pytest.mark.parametrize("bias", [True, False])
def test_catalogue_scores_equal_the_candidates_of_the_same_titles(ops, bias):
    x, head, ptr, tok, b = catalogue()
    b = b if bias else None
    n = ptr.diff()
    padded = torch.zeros(len(n), int(n.max()), dtype=torch.long)
    for i in range(len(n)):
        padded[i, :n[i]] = tok[ptr[i]:ptr[i + 1]]
    want = loop_scores(x.double(), head.double(), padded.expand(3, -1, -1), n.expand(3, -1), None if b is None else b.double())
    close(ops.catalogue_scores(x, head, ptr, tok, b), want)


@BOTH
def test_many_equal_titles_are_listed_by_id(ops):
    # 3000 items of three titles: a sort that is not stable mixes them up
    x, head, *_ = inputs(B=2)
    tok = torch.arange(3000) % 3
    ids, best = ops.catalogue_topk(x, head, torch.arange(3001), tok, 2500)
    for row in range(2):
        score = head[:3] @ x[row]
        order = sorted(range(3000), key=lambda i: (-score[i % 3].item(), i))
        assert ids[row].tolist() == order[:2500]


@BOTH
def test_top_of_the_catalogue_leaves_out_what_was_seen_and_orders_ties_by_id(ops):
    x, head, ptr, tok, b = catalogue()
    score = ops.catalogue_scores(x, head, ptr, tok, b)
    assert torch.equal(score[:, 1], score[:, 4])
    seen = torch.zeros(3, 6, dtype=torch.bool)
    seen[:, 0] = True
    seen[1, 3] = True
    ids, best = ops.catalogue_topk(x, head, ptr, tok, 5, seen, b)
    assert ids.dtype == torch.int64
    for row in range(3):
        want = sorted((i for i in range(6) if not seen[row, i]), key=lambda i: (-score[row, i].item(), i))
        assert ids[row, :len(want)].tolist() == want[:5]
        assert torch.equal(best[row, :len(want)], score[row, want][:5])
    assert best[1, 4] == -torch.inf                      # only four items were left
    ids, best = ops.catalogue_topk(x, head, ptr, tok, 2, bias_V=b)
    assert torch.equal(best, score.topk(2, 1).values)
