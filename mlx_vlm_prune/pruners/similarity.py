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

from .contract import Reduction, Signals, Stage, take
from .numerics import choosing, keep_marked, on_host, rounded_cosine, unit
from .rows import cosine_rows, nearest_slots

stage = Stage.FEATURES


def prune(
    signals: Signals, K: int, *, threshold: float = 0.9, published: bool = False
) -> Reduction:
    """Merge into K clusters. The pass is sequential: similarities return to the host, of up to
    8,192 tokens on a GPU once, and it runs in numpy, in N short steps."""
    with choosing():
        leader_BN = assign_leaders(signals.x_BND, threshold)
        of_k = first_k if published else exactly_k
        parts = [
            of_k(signals.x_BND[b : b + 1], leader_N, K) for b, leader_N in enumerate(leader_BN)
        ]
        index_BK, slot_BN = (mx.concatenate(list(part)) for part in zip(*parts, strict=True))
        return Reduction.merge(index_BK, slot_BN)


def assign_leaders(x_BND: mx.array, threshold: float) -> np.ndarray:
    """The leader of every token, (B, N); a leader leads itself."""
    B, N, _ = x_BND.shape
    leader_BN, first = np.full((B, N), -1), 0
    for block_BnN in cosine_rows(x_BND, hold=False).blocks():
        (similar_BnN,) = on_host(block_BnN)
        for leader_N, similar_nN in zip(leader_BN, similar_BnN, strict=True):
            for i, similar_N in enumerate(similar_nN, first):
                if leader_N[i] < 0:
                    leader_N[i] = i
                    after_n = leader_N[i + 1 :]
                    after_n[(similar_N[i + 1 :] > threshold) & (after_n < 0)] = i
        first += similar_BnN.shape[1]
    return leader_BN


def exactly_k(x_1ND: mx.array, leader_N: np.ndarray, K: int) -> tuple[mx.array, mx.array]:
    """Index (1, K) and slots (1, N) of exactly K clusters that hold every token."""
    leaders, size = np.unique(leader_N, return_counts=True)
    if len(leaders) > K:
        largest = np.sort(leaders[np.argsort(-size, kind="stable")[:K]])
        index_1K = mx.array(largest[None])
        return index_1K, nearest_slots(x_1ND, index_1K)[1]
    unit_1ND, leader_1N = unit(x_1ND), mx.array(leader_N[None])
    similar_1N = rounded_cosine((unit_1ND * take(unit_1ND, leader_1N)).sum(axis=-1))
    leads_1N = leader_1N == mx.arange(len(leader_N))
    order_1N = mx.argsort(mx.where(leads_1N, mx.inf, similar_1N), axis=-1)
    alone_1n = order_1N[:, : K - len(leaders)]
    leader_1N = mx.put_along_axis(leader_1N, alone_1n, alone_1n.astype(leader_1N.dtype), axis=1)
    return clusters_of(leader_1N, K)


def first_k(x_1ND: mx.array, leader_N: np.ndarray, K: int) -> tuple[mx.array, mx.array]:
    """The same of the first K clusters; a token of another has no slot, -1. If there are fewer than
    K, the first of the other tokens lead one each."""
    first = np.unique(leader_N)[:K]
    leader_N = np.where(np.isin(leader_N, first), leader_N, -1)
    others = np.setdiff1d(np.arange(len(leader_N)), first)[: K - len(first)]
    leader_N[others] = others
    return clusters_of(mx.array(leader_N[None]), K)


def clusters_of(leader_1N: mx.array, K: int) -> tuple[mx.array, mx.array]:
    """Index and slots of the clusters of these leaders, -1 for none."""
    leads_1N = leader_1N == mx.arange(leader_1N.shape[1])
    slot_1N = take(mx.cumsum(leads_1N, axis=1) - 1, mx.maximum(leader_1N, 0))
    return keep_marked(leads_1N, K), mx.where(leader_1N < 0, -1, slot_1N)
