"""Is a difference more than the luck of whose samples it was measured on? Users are the clusters:
a user's samples are not independent of each other.

G users, R differences tested at once.
"""

import numpy as np

EXACT = 14  # with so many users or fewer all 2^G patterns of signs are tried
DRAWS = 9999  # patterns that are drawn where there are more; odd, which no 2^G is
DRAWS_A_ROW = 200  # of a large table: its smallest p is .005 after Holm, whatever its size
ROUNDING = 1e-7  # two sums of metrics that differ by less are the same


def user_sums(difference_nR: np.ndarray, user_n: np.ndarray) -> np.ndarray:
    """S_g, the sum of each difference over the samples of user g: float64 (G, R)."""
    _, row_n = np.unique(user_n, return_inverse=True)
    columns = np.asarray(difference_nR, float).reshape(len(row_n), -1).T
    return np.stack([np.bincount(row_n, column) for column in columns], 1)


def draws_of(n_rows: int) -> int:
    """How many patterns are drawn for a table of so many rows: odd, too."""
    return max(DRAWS, DRAWS_A_ROW * n_rows - 1)


def sign_flips(sum_GR: np.ndarray, draws: int = DRAWS) -> np.ndarray:
    """sum_g e_g S_g of each column for patterns of signs e_g = +-1, float64 (patterns, R): all 2^G
    patterns of few users, else `draws` drawn ones, and one more if that is even.

    The columns see the same patterns, so what holds of a difference of columns is the difference of
    what holds of them: one pass serves every pair of rows.
    """
    G, total_R = len(sum_GR), sum_GR.sum(0)
    if G <= EXACT:
        is_plus_PG = (np.arange(2**G)[:, None] >> np.arange(G)) & 1
        return 2 * (is_plus_PG @ sum_GR) - total_R
    draws += 1 - draws % 2  # by that share_as_large tells them from all
    rng, at_once, flipped = np.random.default_rng(0), max(4_000_000 // G, 1), []
    for first in range(0, draws, at_once):
        bytes_DB = rng.integers(0, 256, (min(at_once, draws - first), -(-G // 8)), np.uint8)
        is_plus_DG = np.unpackbits(bytes_DB, axis=1)[:, :G].astype(float)
        flipped.append(2 * (is_plus_DG @ sum_GR) - total_R)
    return np.concatenate(flipped)


def share_as_large(flipped_P: np.ndarray, total: float) -> float:
    """p of the sign-flip test: the share of patterns whose |sum_g e_g S_g| reaches |sum_g S_g|; of
    drawn patterns (1 + those that reach it) / (1 + their number).
    """
    reach = int((np.abs(flipped_P) >= abs(total) - ROUNDING).sum())
    drawn = len(flipped_P) % 2  # 2^G is even
    return (reach + drawn) / (len(flipped_P) + drawn)


def sign_flip(sum_GR: np.ndarray) -> np.ndarray:
    """p of the sign-flip test of each column, float64 (R,): without a difference each user's sum
    S_g could as well have had the other sign."""
    sum_GR = np.asarray(sum_GR, float)
    flipped_PR = sign_flips(sum_GR)
    return np.array([share_as_large(f, s) for f, s in zip(flipped_PR.T, sum_GR.sum(0))])
