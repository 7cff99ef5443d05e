"""Merge similar tokens, in one pass from the top left to the bottom right.

fastvlm-token-pruning (github.com/aledevv/fastvlm-token-pruning), "PruMerge-lite":
each token joins the first earlier leader whose cosine similarity exceeds the
threshold, else it leads a cluster itself; a slot is the mean of its cluster.

As the authors' code (github.com/aledevv/fastvlm-token-pruning@c8feda6) with `published=True`: the
early stop, and the authors' rows; where those are fewer than K, the first of the other tokens
follow unmerged, and stay in their clusters' means too. Differs: by default the pass runs to the
end, where theirs stops as soon as K clusters exist and so drops the bottom of the image when few
tokens are similar, or returns fewer than K when many are; of too many clusters the K largest stay,
and every token joins the most similar of those; of too few, the tokens least like their leader
stand alone.

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
        if published:
            return first_k(leader_BN, K)
        parts = [
            exactly_k(signals.x_BND[b : b + 1], leader_N, K) for b, leader_N in enumerate(leader_BN)
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


def first_k(leader_BN: np.ndarray, K: int) -> Reduction:
    """The first K clusters; where there are fewer, also the first of the other tokens."""
    token_N, index, weight = np.arange(leader_BN.shape[1]), [], []
    for leader_N in leader_BN:
        first = np.unique(leader_N)[:K]
        others = np.setdiff1d(token_N, first)[: K - len(first)]
        index_K = np.sort(np.concatenate([first, others]))
        is_member_KN = (leader_N == index_K[:, None]) | (token_N == index_K[:, None])
        weight.append(is_member_KN / is_member_KN.sum(axis=1, keepdims=True))
        index.append(index_K)
    return Reduction(mx.array(np.stack(index)), mx.array(np.stack(weight).astype(np.float32)))


def clusters_of(leader_1N: mx.array, K: int) -> tuple[mx.array, mx.array]:
    """Index and slots of the clusters of these leaders."""
    leads_1N = leader_1N == mx.arange(leader_1N.shape[1])
    return keep_marked(leads_1N, K), take(mx.cumsum(leads_1N, axis=1) - 1, leader_1N)
