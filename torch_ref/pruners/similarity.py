"""Merge similar tokens: greedy clusters by cosine similarity, in raster order.

fastvlm-token-pruning's "PruMerge-lite" (github.com/aledevv/fastvlm-token-pruning):
a token joins the first earlier leader it is similar to, or leads. `published` stops at
K clusters, as its authors' code does, and so loses the rest of the image. Without it the pass
runs to the end; then the smallest of too many clusters are dissolved, or, of too few, the tokens
least similar to their leaders stand alone.

Shapes: B images, N tokens, K slots.
"""

import torch
from torch import Tensor

from .contract import Reduction, Signals


def prune(
    signals: Signals, K: int, *, threshold: float = 0.9, published: bool = False
) -> Reduction:
    x_BND = signals.x_BND.cpu().double()
    unit_BND = x_BND / x_BND.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    # Float64, and twelve digits of it: what is equal ties, whatever order a product is summed in.
    similar_BNN = (unit_BND @ unit_BND.mT).round(decimals=12)
    B, N, _ = x_BND.shape
    index_BK = torch.zeros(B, K, dtype=torch.long)
    weight_BKN = torch.zeros(B, K, N)
    for b, similar_NN in enumerate(similar_BNN):
        clusters = assign_leaders(similar_NN, threshold)
        chosen = first_k(clusters, K, N) if published else exactly_k(clusters, similar_NN, K)
        for k, leader in enumerate(sorted(chosen)):
            index_BK[b, k] = leader
            weight_BKN[b, k, chosen[leader]] = 1 / len(chosen[leader])
    device = signals.x_BND.device
    return Reduction(index_BK.to(device), weight_BKN.to(device))


def assign_leaders(similar_NN: Tensor, threshold: float) -> dict[int, list[int]]:
    """Members of each leader, the leader first."""
    clusters: dict[int, list[int]] = {}
    for token, row in enumerate(similar_NN.tolist()):
        joined = next((leader for leader in clusters if row[leader] > threshold), token)
        clusters.setdefault(joined, []).append(token)
    return clusters


def first_k(clusters: dict[int, list[int]], K: int, N: int) -> dict[int, list[int]]:
    """The first K clusters; where there are fewer, the lowest other tokens too, on their own."""
    kept = {leader: clusters[leader] for leader in sorted(clusters)[:K]}
    others = [token for token in range(N) if token not in kept]
    return kept | {token: [token] for token in others[: K - len(kept)]}


def exactly_k(clusters: dict[int, list[int]], similar_NN: Tensor, K: int) -> dict[int, list[int]]:
    """K clusters that hold every token."""
    if len(clusters) <= K:
        leader_of = {token: leader for leader, members in clusters.items() for token in members}
        followers = [token for token in leader_of if token != leader_of[token]]
        followers.sort(key=lambda token: (similar_NN[token, leader_of[token]].item(), token))
        return split_off(clusters, followers[: K - len(clusters)])
    largest = sorted(clusters, key=lambda leader: (-len(clusters[leader]), leader))[:K]
    merged: dict[int, list[int]] = {leader: [] for leader in sorted(largest)}
    for token, row in enumerate(similar_NN.tolist()):
        home = token if token in merged else max(merged, key=lambda leader: (row[leader], -leader))
        merged[home].append(token)
    return merged


def split_off(clusters: dict[int, list[int]], tokens: list[int]) -> dict[int, list[int]]:
    """The clusters after some tokens have left them to stand alone."""
    left = set(tokens)
    rest = {leader: [t for t in members if t not in left] for leader, members in clusters.items()}
    return rest | {token: [token] for token in tokens}
