"""Is a difference more than the luck of whose samples it was measured on? Users are the clusters:
a user's samples are not independent of each other.

G users, R differences tested at once.
"""

import numpy as np

EXACT = 14  # so many users at most: all 2^G signs are tried


def user_sums(difference_nR: np.ndarray, user_n: np.ndarray) -> np.ndarray:
    """S_g, the sum of each difference over the samples of user g: float64 (G, R)."""
    _, row_n = np.unique(user_n, return_inverse=True)
    columns = np.asarray(difference_nR, float).reshape(len(row_n), -1).T
    return np.stack([np.bincount(row_n, column) for column in columns], 1)


def sign_flip(total_GR: np.ndarray, draws: int = 9999, seed: int = 0) -> np.ndarray:
    """p of the sign-flip test over users, float64 (R,): without a difference each user's sum S_g
    could as well have had the other sign.

    T = |sum_g S_g| against |sum_g e_g S_g| with signs e_g = +-1. For G <= 14 all 2^G patterns:
    p = #{>= T} / 2^G. Else `draws` random ones: p = (1 + #{>= T}) / (draws + 1).
    """
    total_GR = np.asarray(total_GR, float)
    G = len(total_GR)
    # sums of the same numbers in another order differ in the last bits
    least_R = np.abs(total_GR.sum(0)) - 1e-9 * np.abs(total_GR).sum(0)
    if G <= EXACT:
        bit_PG = np.arange(2**G)[:, None] >> np.arange(G) & 1
        return (np.abs((2 * bit_PG - 1) @ total_GR) >= least_R).mean(0)
    rng, reached_R = np.random.default_rng(seed), np.ones(total_GR.shape[1])
    # 200 draws at a time: draws x users would not fit for large data
    for begin in range(0, draws, 200):
        bit_PG = rng.integers(0, 2, (min(200, draws - begin), G), dtype=np.int8)
        flipped_PR = 2 * (bit_PG.astype(np.float32) @ total_GR) - total_GR.sum(0)
        reached_R += (np.abs(flipped_PR) >= least_R).sum(0)
    return reached_R / (draws + 1)
