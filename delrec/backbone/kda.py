"""KDA_LRD-style (arXiv 2403.18348): a history is read through each candidate, once a relation.

Relation 0 says only that two items were taken by one user, 1..K are latent: nobody names them, the
titles tell which of them joins a pair (latent relation discovery). Of candidate i and the history's
items j, with entity vectors e and relation vectors r:

    a_rj = softmax_j e_j . (r_r * e_i),   m_ri = sum_j a_rj e_j
    score = mean_r Layer(m_1i .. m_Ri) . e_i + b_i

The relations' loss L_LRD asks of each latent r, for a history's items j, random ones j' beside them
and the target i, with g a linear map of a title's vector:

    pi_r(j, i) = softmax_r W [g_j, g_i],   phi_r(j, i) = pi_r (<e_j * r_r, e_i> + <e_j, r_r>)
    L_LRD = - mean_r log mean_j sigmoid(phi_r(j, i) - phi_r(j', i)) + .1 mean_jr H(pi)

Beside the original: no relation of products (category, also bought), so no triples of them; no
vector of a user, so that any history can be scored; no fading with time. <e_i, r_r> is left out of
phi, as it is the same for j and j'.

There is no state of a history. What stands in its place is the history itself, B rows of L ids.

Names: B histories, L window, C candidates, R = K + 1 relations, E width, I items (0 pads on the
left), D width of a title's vector, N pairs of a history and a candidate.
"""

from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from delrec.backbone.layers import Dropout

INNER = 64  # width of g
ENTROPY = 0.1  # its weight in L_LRD
MOST = 2**20  # numbers of a pass over candidates
CHOOSING = 1024  # validation samples that choose the epoch, at most


class KDA(nn.Module):
    """Relations as attention of a candidate to the history, joined by one layer of attention among
    them."""

    one_state, cloze = True, False

    def __init__(self, n_items: int, cfg: SimpleNamespace):
        super().__init__()
        E, K = cfg.width, cfg.latent
        self.item = nn.Embedding(n_items + 1, E, padding_idx=0)
        self.relation = nn.Parameter(0.02 * torch.randn(K + 1, E))
        self.qkv = nn.Linear(E, 3 * E, bias=False)
        self.inner, self.outer = nn.Linear(E, E), nn.Linear(E, E)
        self.norm, self.drop = nn.LayerNorm(E), Dropout(cfg.dropout)
        self.weight = cfg.latent_weight  # of L_LRD in the loss
        self.latent = None  # while it trains: which relation joins two titles

    def forward(self, seq_BL: torch.Tensor, last: bool = False) -> torch.Tensor:
        """What stands for the state, B1L: the history itself."""
        return seq_BL[:, None]

    def scores(
        self, seq_BL: torch.Tensor, item_CE: torch.Tensor, bias_C: torch.Tensor
    ) -> torch.Tensor:
        """The scores (B, C) of items, by their vectors and biases, after histories."""
        y_BLE, real_BL = self.item(seq_BL), seq_BL != 0
        size = max(1, MOST // (len(self.relation) * item_CE.shape[1]))  # pairs of a pass
        rows = max(1, min(len(seq_BL), size // 64))
        columns = max(1, size // rows)
        score_BC = [
            torch.cat([self.read(y, real, part[None]) for part in item_CE.split(columns)], 1)
            for y, real in zip(y_BLE.split(rows), real_BL.split(rows))
        ]
        return torch.cat(score_BC) + bias_C

    def read(
        self, y_BLE: torch.Tensor, real_BL: torch.Tensor, item_XCE: torch.Tensor
    ) -> torch.Tensor:
        """m . e of candidates, (B, C). item_XCE: of each history its own (X = B), or the same for
        all (X = 1). real_BL: is there an item?"""
        C, R = item_XCE.shape[1], len(self.relation)
        asks_XCRE = item_XCE[:, :, None] * self.relation
        a_BXL = asks_XCRE.flatten(1, 2) @ y_BLE.transpose(1, 2)  # X = C R
        # an empty history is one of nothing: zeros
        a_BXL = a_BXL.masked_fill(~real_BL[:, None], -1e9).softmax(-1)
        m_BCRE = (a_BXL @ y_BLE).unflatten(1, (C, R))
        joined_BCE = self.layer(m_BCRE).mean(2)
        return (joined_BCE * item_XCE).sum(-1)

    def layer(self, m_BCRE: torch.Tensor) -> torch.Tensor:
        """LN(m + Drop(W_2 relu(W_1 z))), z = attention among relations, as in their code.

        Queries and keys meet as m W_q' W_k m', values go on as m (W_1 W_v)': three products a pair
        instead of five."""
        q_EE, k_EE, v_EE = self.qkv.weight.chunk(3)
        meets_BCRR = (m_BCRE @ (q_EE.T @ k_EE)) @ m_BCRE.transpose(-1, -2)
        a_BCRR = (meets_BCRR * len(q_EE) ** -0.5).softmax(-1)
        inner_BCRE = a_BCRR @ (m_BCRE @ (self.inner.weight @ v_EE).T) + self.inner.bias
        return self.norm(m_BCRE + self.drop(self.outer(F.relu(inner_BCRE))))

    # ------------------------------------------------------------ training

    def take_text(self, z_ID: torch.Tensor) -> None:
        """Lets titles' vectors z (I+1, D) tell the relations, until drop_text."""
        self.latent = Latent(z_ID, len(self.relation))

    @torch.no_grad()
    def drop_text(self) -> None:
        """Takes off what only training needs. `chosen`, for the run's record, says how pairs of
        titles share the relations: where one has them all, nothing was told apart."""
        if self.latent is not None:
            item_I = torch.arange(1, len(self.bias), device=self.bias.device)
            pi_IR = self.latent(item_I[:, None], item_I.roll(1))[:, 0]
            self.chosen = {"relations": [round(share, 3) for share in pi_IR.mean(0).tolist()]}
        self.latent = None

    def loss(
        self, seq_BL: torch.Tensor, target_B: torch.Tensor, other_BL: torch.Tensor
    ) -> torch.Tensor:
        """Sum over histories of the ranking loss and the weighted L_LRD. other_BL: items that the
        user never had; both losses compare with them."""
        y_BLE, real_BL = self.item(seq_BL), seq_BL != 0
        asked_BC = torch.cat([target_B[:, None], other_BL], 1)
        s_BC = self.read(y_BLE, real_BL, self.item(asked_BC)) + self.bias[asked_BC]
        if self.latent is None:  # titles tell nothing: no latent relation, or no weight
            return ranking_loss(s_BC).sum()
        pi_BLR = self.latent(seq_BL, target_B)
        apart_BLE = y_BLE - self.item(other_BL)
        between_B = self.discovery(pi_BLR, apart_BLE, self.item(target_B), real_BL)
        return ranking_loss(s_BC).sum() + self.weight * between_B.sum()

    def discovery(
        self,
        pi_BLR: torch.Tensor,
        apart_BLE: torch.Tensor,
        target_BE: torch.Tensor,
        real_BL: torch.Tensor,
    ) -> torch.Tensor:
        """L_LRD of each history (B,). apart_BLE: e_j - e_j'. Relation 0 has no part in it."""
        asks_BRE = self.relation[1:] * (target_BE[:, None] + 1)  # r e_i + r
        phi_BLR = pi_BLR[..., 1:] * (apart_BLE @ asks_BRE.transpose(1, 2))
        w_BL1 = (real_BL / real_BL.sum(1, keepdim=True).clamp(min=1))[..., None]
        told_B = -(F.logsigmoid(phi_BLR) + w_BL1.log()).logsumexp(1).mean(1)
        entropy_BLR = -pi_BLR * pi_BLR.clamp(min=1e-9).log()
        return told_B + ENTROPY * (entropy_BLR * w_BL1).sum(1).mean(1)


class Latent(nn.Module):
    """pi(j, i) = softmax W [g_j, g_i]: which relation joins two titles."""

    def __init__(self, z_ID: torch.Tensor, R: int):
        super().__init__()
        self.register_buffer("z_ID", z_ID, persistent=False)
        self.g = nn.Linear(z_ID.shape[1], INNER, device=z_ID.device)
        self.old = nn.Linear(INNER, R, device=z_ID.device)
        self.new = nn.Linear(INNER, R, bias=False, device=z_ID.device)
        for part in (self.g, self.old, self.new):
            # all relations alike at first: else the entropy settles on one before any is learnt
            nn.init.normal_(part.weight, std=0.01)

    def forward(self, seq_BL: torch.Tensor, target_B: torch.Tensor) -> torch.Tensor:
        """pi_BLR of the items of histories and a target each."""
        old_BLR = self.old(self.g(self.z_ID[seq_BL]))
        return (old_BLR + self.new(self.g(self.z_ID[target_B]))[:, None]).softmax(-1)


def ranking_loss(s_BC: torch.Tensor) -> torch.Tensor:
    """-log sum_n w_n sigmoid(s_0 - s_n) of each row (B,): its first score against the others, which
    weigh by their softmax w."""
    apart_Bn = s_BC[:, :1] - s_BC[:, 1:]
    return -((F.logsigmoid(apart_Bn) + s_BC[:, 1:].log_softmax(1)).logsumexp(1))
