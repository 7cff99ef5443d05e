"""Prune what matters least, and cluster the rest.

PACT, Dhouib et al., CVPR 2025, arXiv:2504.08966. At `layer` (4 of 32): a token's worth is
the softmax over tokens of its key with the mean visual query (mean over heads), times
the norm of its hidden state. The least worthy are pruned; the others are clustered by
the distance of their keys: in the order of density a token becomes a centre when it is
farther than a cutoff from every centre so far. A cluster's mean goes on, counting in
attention as often as it has members; a pruned token within 1.5 cutoffs of a centre is
taken into its mean after all. Positions are renumbered.

Differs from the authors' code: exactly K clusters, so the cutoff follows from the budget
(bisection), with the most worthy filling up.

One centre after another is found, so on a GPU similarities return to the host, once.

Options:
    layer: layer of the language model before which tokens leave; below 1 a share of the depth
    clustered: share of the tokens beyond K that is clustered, not pruned; 0 to 1

Shapes: I images, N tokens, K kept, n tokens that are clustered, D features.
"""

import mlx.core as mx
import numpy as np

from .budget import one_cut
from .contract import Reduction, Signals, Stage
from .numerics import choosing, cosine, on_host, rounded, to_choice_dtype

stage = Stage.DECODER
needs: dict[str, str | None] = {"mean_attention": None}
positions = "renumber"
proportional = True
RETRIEVED = 1.5  # cutoffs: a pruned token as near to a centre is merged after all


def schedule(layers: int, N: int, K: int, *, layer: float = 4 / 32) -> dict[int, int]:
    """One cut."""
    return one_cut(layers, N, K, layer)


def prune(signals: Signals, K: int, *, clustered: float = 0.5) -> Reduction:
    """Merge into K clusters; of the tokens beyond K, the share `clustered` is not pruned.

    Whether a token becomes a centre depends on all centres before it, and that for each of 22
    cutoffs: so similarities return to the host, once.
    """
    if not 0 <= clustered <= 1:
        raise ValueError(f"clustered is {clustered}; it is a share from 0 to 1")
    with choosing():
        length_BN = mx.sqrt(mx.square(to_choice_dtype(signals.x_BND)).sum(axis=-1))
        worth_BN = rounded(to_choice_dtype(signals.mean_attention_BN) * length_BN)
        worths, alike = on_host(worth_BN, cosine(signals.next_keys_BND))
    n = K + int(clustered * (worth_BN.shape[1] - K))
    pairs = [cluster(w, 1 - a, K, n) for w, a in zip(worths, alike, strict=True)]
    index_BK, weight_BKN = (np.stack(parts) for parts in zip(*pairs, strict=True))
    return Reduction(mx.array(index_BK), mx.array(weight_BKN.astype(np.float32)))


def cluster(
    worth_N: np.ndarray, distance_NN: np.ndarray, K: int, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Index (K,) and weights (K, N): the means of K clusters of the n most worthy tokens."""
    order = np.argsort(-worth_N, kind="stable")[:n]
    cutoff, centres = smallest_cutoff(distance_NN[np.ix_(order, order)], K)
    others = [i for i in range(n) if i not in set(centres)]
    index_K = np.sort(order[centres + others[: K - len(centres)]])
    distance_KN = distance_NN[index_K]
    home_N, near_N = distance_KN.argmin(axis=0), distance_KN.min(axis=0)
    belongs_N = np.isin(np.arange(len(worth_N)), order) | (near_N <= RETRIEVED * cutoff)
    home_N[index_K] = np.arange(K)
    member_KN = (home_N == np.arange(K)[:, None]) & belongs_N
    return index_K, member_KN / member_KN.sum(axis=1, keepdims=True)


def smallest_cutoff(distance_nn: np.ndarray, K: int) -> tuple[float, list[int]]:
    """The smallest cutoff, to a millionth, that gives at most K centres, with those centres."""
    low, high = -1e-6, 2.0  # of one minus a cosine
    for _ in range(21):
        middle = (low + high) / 2
        low, high = (
            (low, middle) if len(spaced_centres(distance_nn, middle)) <= K else (middle, high)
        )
    return high, spaced_centres(distance_nn, high)


def spaced_centres(distance_nn: np.ndarray, cutoff: float) -> list[int]:
    """Centres in the order of density, each farther than the cutoff from all before it."""
    density_n = np.exp(-((distance_nn / max(cutoff, 1e-6)) ** 2)).sum(axis=1).round(9)
    centres: list[int] = []
    for i in np.argsort(-density_n, kind="stable").tolist():
        if not centres or distance_nn[i, centres].min() > cutoff:
            centres.append(i)
    return centres
