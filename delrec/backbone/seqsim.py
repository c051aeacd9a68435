"""LLMSEQSIM (arXiv 2309.09261): the items whose titles are most like those of a history. Nothing is
trained.

    x = sum_a w_a z_(a) / sum_a w_a,   score of item i = x . z_i

z_(a) is the vector of the history's a-th newest title. How fast w_a falls, and how two vectors are
compared, is chosen on validation. The item vectors are the titles', so what reads a backbone's
vectors or states reads these.

Names: B sequences, L window, R rows that are computed (the last of L), E width, I items (ids 1..I,
0 pads on the left).
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn

# the weight w_a of the a-th newest item. Of the paper's, those that do not ask how long a history
# is; `last` and `mean` are the ends between which they lie
DECAYS = {
    "last": lambda a: 1.0 * (a == 1),
    "1/a^2": lambda a: a**-2,
    "1/a": lambda a: 1 / a,
    "1/(1 + ln a)": lambda a: 1 / (1 + np.log(a)),
    "1 - (a - 1)/10": lambda a: np.maximum(0, 1 - 0.1 * (a - 1)),
    "mean": np.ones_like,
}
# the norm that titles' vectors are divided by before they meet; None: they stay as they are
SIMILARITIES = {"cosine": 2, "dot": None, "dot over L1 norms": 1}


class SeqSim(nn.Module):
    """The weighted mean of a history's titles; `item` holds their vectors. Its biases are 0."""

    one_state, cloze = False, False

    def __init__(self, n_items: int, cfg: SimpleNamespace):
        super().__init__()
        self.item = nn.Embedding(n_items + 1, cfg.width, padding_idx=0)
        self.weight_L = nn.Parameter(torch.ones(cfg.history), requires_grad=False)

    def forward(self, seq_BL: torch.Tensor, last: bool = False) -> torch.Tensor:
        """The states x_BLE after the items seq_BL; with `last` only the last one's, x_B1E."""
        L = seq_BL.shape[1]
        place_L = torch.arange(L, device=seq_BL.device)
        age_RL = place_L[-1:, None] - place_L if last else place_L[:, None] - place_L
        w_RL = torch.where(age_RL < 0, 0, self.weight_L[age_RL.clamp(min=0)])
        w_BRL = w_RL * (seq_BL != 0)[:, None]
        return w_BRL @ self.item(seq_BL) / w_BRL.sum(-1, keepdim=True).clamp(min=1e-9)

    def take_text(self, z_ID: torch.Tensor) -> None:
        """Makes the titles' vectors z (I+1, D) the item vectors, with zeros behind where D is less
        than E; popularity has no say."""
        E = self.item.embedding_dim
        self.item.weight.copy_(nn.functional.pad(z_ID, (0, E - z_ID.shape[1])))
        self.bias.zero_()


@torch.no_grad()
def choose(model: SeqSim, validate: Callable[[], dict]) -> str:
    """Sets the weights and the norm of the vectors that are best on validation; says which, in a
    line. model.chosen holds that for the run's record, and what the others reached.

    validate(): the metrics of the samples that choose a trained model's epoch (Protocol)."""
    z_IE, age_L = model.item.weight.clone(), np.arange(1.0, len(model.weight_L) + 1)
    found = {}
    for similarity, norm in SIMILARITIES.items():
        for decay, weight_of in DECAYS.items():
            set_to(model, z_IE, norm, weight_of(age_L))
            found[similarity, decay] = validate()["val_ndcg@10"]
    similarity, decay = max(found, key=found.get)
    set_to(model, z_IE, SIMILARITIES[similarity], DECAYS[decay](age_L))
    tried = {f"{name}, {weight}": value for (name, weight), value in found.items()}
    model.chosen = {"similarity": similarity, "decay": decay, "tried": tried, "optimiser": "none"}
    return (
        f"chosen on validation among {len(found)}: {similarity}, w_a = {decay} (ndcg@10 of all "
        f"items {found[similarity, decay]:.4f}; the least {min(found.values()):.4f})"
    )


def set_to(model: SeqSim, z_IE: torch.Tensor, norm: int | None, weight_L: np.ndarray) -> None:
    """Gives the model the titles' vectors, each over its norm, and the weights by age."""
    size_I1 = 1.0 if norm is None else z_IE.norm(norm, dim=1, keepdim=True).clamp(min=1e-9)
    model.item.weight.copy_(z_IE / size_I1)
    model.weight_L.copy_(torch.from_numpy(weight_L))
