"""Merge similar tokens, in one pass from the top left to the bottom right.

fastvlm-token-pruning (github.com/aledevv/fastvlm-token-pruning), "PruMerge-lite":
each token joins the first earlier leader whose cosine similarity exceeds the
threshold, else it leads a cluster itself; a slot is the mean of its cluster.

Differs from the authors' code, which stops as soon as K clusters exist and so drops
the bottom of the image when few tokens are similar, or returns fewer than K when many are.
Here the pass runs to the end. Too many clusters: the K largest stay, and every token
joins the most similar of those. Too few: the tokens least like their leader stand
alone. `published=True` keeps the early stop (and fills up to K, a promise here).

One token after another is looked at, so on a GPU similarities return to the host, once.

Options:
    threshold: cosine above which a token joins a leader, -1 to 1
    published: stop at K clusters, as the authors' code does

Shapes: B images, N tokens, D features, K slots.
"""

import mlx.core as mx
import numpy as np

from .contract import Reduction, Signals, Stage
from .numerics import choosing, cosine, on_host

stage = Stage.FEATURES


def prune(
    signals: Signals, K: int, *, threshold: float = 0.9, published: bool = False
) -> Reduction:
    """Merge into K clusters. The pass is sequential: similarities return to the host, once, and it
    runs in numpy, in N short steps."""
    with choosing():
        (similar_BNN,) = on_host(cosine(signals.x_BND))
    to_k = first_k if published else exactly_k
    leader_BN = np.stack([to_k(s_NN, assign_leaders(s_NN, threshold), K) for s_NN in similar_BNN])
    index_BK = np.stack([np.flatnonzero(row == np.arange(len(row))) for row in leader_BN])
    member_BKN = leader_BN[:, None, :] == index_BK[:, :, None]
    weight_BKN = member_BKN / member_BKN.sum(axis=-1, keepdims=True)
    return Reduction(mx.array(index_BK), mx.array(weight_BKN.astype(np.float32)))


def assign_leaders(similar_NN: np.ndarray, threshold: float) -> np.ndarray:
    """The leader of every token, (N,); a leader leads itself."""
    alike_NN = similar_NN > threshold
    leader_N = np.full(len(alike_NN), -1)
    for i in range(len(alike_NN)):
        if leader_N[i] < 0:
            leader_N[i] = i
            after = np.flatnonzero(alike_NN[i, i + 1 :]) + i + 1
            leader_N[after] = np.where(leader_N[after] < 0, i, leader_N[after])
    return leader_N


def exactly_k(similar_NN: np.ndarray, leader_N: np.ndarray, K: int) -> np.ndarray:
    """The leaders, (N,), of exactly K clusters that hold every token."""
    leaders, size = np.unique(leader_N, return_counts=True)
    if len(leaders) > K:
        largest = leaders[np.argsort(-size, kind="stable")[:K]]
        largest.sort()
        leader_N = largest[np.argmax(similar_NN[:, largest], axis=1)]
        leader_N[largest] = largest
    elif len(leaders) < K:
        token_N = np.arange(len(leader_N))
        to_leader_N = np.where(leader_N == token_N, np.inf, similar_NN[token_N, leader_N])
        alone = np.argsort(to_leader_N, kind="stable")[: K - len(leaders)]
        leader_N = leader_N.copy()
        leader_N[alone] = alone
    return leader_N


def first_k(similar_NN: np.ndarray, leader_N: np.ndarray, K: int) -> np.ndarray:
    """The leaders, (N,), of the first K clusters; -1 for a token of another. If there are fewer
    than K, the first of the other tokens lead one each."""
    leaders = np.unique(leader_N)
    first = leaders[:K]
    leader_N = np.where(np.isin(leader_N, first), leader_N, -1)
    others = np.setdiff1d(np.arange(len(leader_N)), first)[: K - len(first)]
    leader_N[others] = others
    return leader_N
