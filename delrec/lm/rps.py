"""What an LM on item vectors is taught of a backbone's answers, from its scores of all items
(Recommendation Pattern Simulating; DELRec, arXiv 2406.11156, section IV-B, asks for r_1 alone).

Names: N reads, I items, h items of a list, S the best items of a soft target.
"""

import torch

BEST = 100  # S


def listwise(s_NI: torch.Tensor, ranked_Nh: torch.Tensor) -> torch.Tensor:
    """Plackett-Luce: minus the mean log probability of drawing r_1..r_h in their order, each from
    the items that are not yet drawn: (N,). s_NI: scores of the items 1..I; ranked_Nh: int64, items.
    With h = 1 it is the cross-entropy of r_1 over the catalogue.
    """
    at = ranked_Nh - 1
    s_Nh = s_NI.gather(1, at)
    rest_N = s_NI.scatter(1, at, -torch.inf).logsumexp(1)
    # log sum over r_m..r_h and all that are not listed
    left_Nh = torch.logaddexp(rest_N[:, None], s_Nh.flip(1).logcumsumexp(1).flip(1))
    return (left_Nh - s_Nh).mean(1)


def soft_target(s_NI: torch.Tensor, y_NI: torch.Tensor, T: float) -> torch.Tensor:
    """KL(p || q) (N,) of p = softmax(y / T), what the backbone says, and q = softmax(s), the LM's.
    Both are told of the backbone's best S items, and of all others together. y may be -inf, where
    p is 0; s is finite."""
    log_p_NI, log_q_NI = (y_NI / T).log_softmax(1), s_NI.log_softmax(1)
    best_NS = log_p_NI.topk(min(BEST, s_NI.shape[1] - 1)).indices
    log_p, log_q = (with_rest(log_NI, best_NS) for log_NI in (log_p_NI, log_q_NI))
    # sum_i p_i (log p_i - log q_i) over the S items and the rest; p log p is 0 at 0
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0).sum(1)


def with_rest(log_NI: torch.Tensor, best_NS: torch.Tensor) -> torch.Tensor:
    """Log probabilities of some items, and of all others together as one more: (N, S+1)."""
    rest_N = log_NI.scatter(1, best_NS, -torch.inf).logsumexp(1)
    return torch.cat([log_NI.gather(1, best_NS), rest_N[:, None]], 1)
