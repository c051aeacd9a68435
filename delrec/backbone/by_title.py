"""Items without a history: rows of a table by their titles, by a map fitted on the trained items.

Ridge regression: with X the vectors of the trained items' titles and Y their rows of a table (item
vectors, and biases where a model has them), W is the least |X W - Y|^2 + r |W|^2, and a new title x
has the row mean(Y) + x W.

What titles leave open is known, too. With W of one half of the trained items, the residuals of the
other half have a covariance S. An item whose row is y + e, e ~ N(0, S), has in a softmax on average
the weight E exp(u . (y + e)) = exp(u . y + u' S u / 2), u = (x, 1) the state of a history: so its
score is u . y + u' S u / 2 (ours). By u . y alone it stands too low.

Titles are bags of words for items that a service adds (delrec/serving/new_items.py), and the
vectors of --text for items that stand in the catalogue already (--cold-out, here).
"""

import torch

from delrec.backbone.models import state
from delrec.data.counts import seen_in_training
from delrec.data.prepared import Data, histories, subset

# r, where a title has norm 1: likeliest on validation (docs/results/new_items.md)
RIDGE = 1.0
STEPS = 60  # of conjugate gradients, at most
CLOSE = 1e-4  # share of the first residual at which they end
PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0)  # of --cold-out, whose vectors have many numbers an item
HISTORIES = 2000  # of training, whose mean says how far S lifts an item


def ridge(X: torch.Tensor, Y: torch.Tensor, r: float = RIDGE) -> torch.Tensor:
    """W (V, E), the least |X W - Y|^2 + r |W|^2. X: (n, V), which may be sparse; Y: (n, E)."""
    if X.is_sparse:
        return by_conjugate_gradients(X, Y, r)
    square_VV = X.T @ X + r * torch.eye(X.shape[1], device=X.device)
    return torch.linalg.solve(square_VV, X.T @ Y)


def by_conjugate_gradients(X: torch.Tensor, Y: torch.Tensor, r: float) -> torch.Tensor:
    """The same for a sparse X (n, V), which stays so; each column on its own."""
    Xt = X.t().coalesce()
    W = torch.zeros(X.shape[1], Y.shape[1])
    left = torch.sparse.mm(Xt, Y)  # the residual of (X'X + r) W = X'Y
    way, square_E = left.clone(), (left * left).sum(0)
    enough_E = square_E * CLOSE**2
    for _ in range(STEPS):
        if (square_E <= enough_E).all():
            break
        moved = torch.sparse.mm(Xt, torch.sparse.mm(X, way)) + r * way
        step_E = square_E / (way * moved).sum(0).clamp(min=1e-30)
        W += step_E * way
        left -= step_E * moved
        now_E = (left * left).sum(0)
        way = left + now_E / square_E.clamp(min=1e-30) * way
        square_E = now_E
    return W


def left_open(X: torch.Tensor, Y: torch.Tensor, r: float = RIDGE) -> torch.Tensor:
    """S (E, E): the covariance of what titles X (n, V) do not tell of rows Y (n, E)."""
    half = torch.arange(len(Y), device=Y.device) % 2 == 0
    left = [residuals(X, Y, fitted, r) for fitted in (half, ~half)]
    return sum(part.T @ part for part in left) / len(Y)


def residuals(X: torch.Tensor, Y: torch.Tensor, fitted: torch.Tensor, r: float) -> torch.Tensor:
    """What the map of the items `fitted` (a mask) leaves of the rows of the others."""
    own, rest = torch.where(fitted)[0], torch.where(~fitted)[0]
    mean = Y[own].mean(0)
    W = ridge(X.index_select(0, own), Y[own] - mean, r)
    return Y[rest] - mean - X.index_select(0, rest) @ W


def best_penalty(X: torch.Tensor, Y: torch.Tensor) -> float:
    """r with which the map of one half of the items leaves least of the other half."""
    return min(PENALTIES, key=lambda r: float(left_open(X, Y, r).trace()))


@torch.no_grad()
def give_rows(model: torch.nn.Module, Z: torch.Tensor, text_IE: torch.Tensor, data: Data) -> None:
    """Gives the items that training never saw (--cold-out) the vectors and biases that their titles
    Z (I+1, D) make likely: what the text says of a vector, text_IE (I+1, E), and what titles tell
    of the rest and the bias. u' S u / 2 is hardly another for another history, so its mean stands
    in the bias, and the model stays a plain one.
    """
    trained = torch.from_numpy(seen_in_training(data)).to(Z.device)
    is_cold_I = torch.ones(len(Z), dtype=torch.bool, device=Z.device)
    is_cold_I[trained] = is_cold_I[0] = False
    Y = torch.cat([model.item.weight - text_IE, model.bias[:, None]], 1)[trained]
    r, mean = best_penalty(Z[trained], Y), Y.mean(0)
    row_AX = mean + Z[is_cold_I] @ ridge(Z[trained], Y - mean, r)
    model.item.weight[is_cold_I] = text_IE[is_cold_I] + row_AX[:, :-1]
    model.bias[is_cold_I] = row_AX[:, -1] + mean_lift(model, left_open(Z[trained], Y, r), data)


def mean_lift(model: torch.nn.Module, S: torch.Tensor, data: Data) -> torch.Tensor:
    """The mean lift over histories of training."""
    some = data.train[subset(len(data.train), HISTORIES, 0)]
    return lift(state(model.eval(), histories(data, some, model.history)), S).mean()


def lift(x_BE: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
    """u' S u / 2 (B,), u = (x, 1): what a covariance S (E+1, E+1) of a vector and a bias adds to an
    item's score after histories of the states x."""
    u_BX = torch.cat([x_BE, x_BE.new_ones(len(x_BE), 1)], 1)
    return ((u_BX @ S) * u_BX).sum(1) / 2
