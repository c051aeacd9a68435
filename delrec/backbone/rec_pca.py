"""Directions of titles' vectors that also follow who was taken with whom (Rec-PCA, TF-LLMER, arXiv
2604.20490; rebuilt from its abstract).

PCA keeps the directions along which vectors vary most. These keep variance less lam times the total
variation over the graph of co-occurrence: along them, items that stood near each other in training
are near each other.

Names: I items (ids 1..I, 0 pads), D width of the vectors, K directions.
"""

import numpy as np
import torch

from delrec.data.counts import near_in_training
from delrec.data.prepared import Data


def turned_by_graph(Z_ID: np.ndarray, data: Data, lam: float, wide: int) -> np.ndarray:
    """The leading directions Z U (I+1, wide at most) of Z' (1 - lam Lap) Z, each row of norm 1.
    With lam 0 they are those of PCA.

    Z_ID: centred on the items that occur in training, of which alone the graph knows.
    """
    around_ID, is_in_I = smoothed(Z_ID, data)
    own_ID = Z_ID * is_in_I[:, None]
    # Lap Z = Z - around Z
    kept_DD = own_ID.T @ ((1 - lam) * own_ID + lam * around_ID)
    _, U_DD = np.linalg.eigh((kept_DD + kept_DD.T) / 2)
    U_DK = U_DD[:, ::-1][:, :wide]
    largest_K = U_DK[np.abs(U_DK).argmax(0), np.arange(U_DK.shape[1])]
    new_IK = Z_ID @ (U_DK * np.sign(largest_K))
    norm_I1 = np.linalg.norm(new_IK, axis=1, keepdims=True)
    return (new_IK / np.maximum(norm_I1, 1e-12)).astype(np.float32)


def smoothed(Z_ID: np.ndarray, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """(A^(-1/2) C A^(-1/2) Z (I+1, D), which items occur in training (I+1,)): C how often two items
    stood within 5 steps of each other, A its sums over rows. An item that stood near no other is
    its own neighbour, so that only its variance counts."""
    near, n = near_in_training(data), len(Z_ID)
    a, b = near.pair // n, near.pair % n
    apart = a != b
    a, b = a[apart], b[apart]
    row, column = np.r_[a, b], np.r_[b, a]
    times = np.r_[near.times[apart], near.times[apart]].astype(np.float64)
    lonely = np.setdiff1d(np.flatnonzero(near.count_I), row)
    row, column = np.r_[row, lonely], np.r_[column, lonely]
    times = np.r_[times, np.ones(len(lonely))]
    degree_I = np.bincount(row, times, minlength=n)
    weight = times / np.sqrt(degree_I[row] * degree_I[column])
    graph_II = torch.sparse_coo_tensor(
        np.stack([row, column]), weight, (n, n), check_invariants=True
    ).coalesce()
    around_ID = graph_II @ torch.from_numpy(Z_ID.astype(np.float64))
    return around_ID.numpy(), near.count_I > 0
