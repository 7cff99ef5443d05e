"""LLaVA-PruMerge (arXiv:2403.15388): by CLS attention, each taking up its 32 nearest.

Shapes: N tokens, K kept, D all heads' features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .contract import Reduction, Signals, cosine, highest, weighted_reduction

needs = {"cls_query": "layer", "keys": "layer"}


def prune(signals: Signals, K: int, *, neighbours: int = 32, layer: float = -1) -> Reduction:
    return absorbed(signals, K, neighbours, lambda score_N: highest(score_N, max(1, K - 1)))


def absorbed(
    signals: Signals, K: int, neighbours: int, choose: Callable[[Tensor], list[int]]
) -> Reduction:
    """The tokens that are chosen of each image by their scores (N,), with their neighbours."""
    pairs = []
    for query_Hd, keys_NHd in zip(signals.cls_query_BHd, signals.keys_BNHd, strict=True):
        keys_ND = keys_NHd.flatten(1)
        logits_N = keys_ND.double() @ query_Hd.flatten().double() / keys_ND.shape[1] ** 0.5
        score_N = logits_N.softmax(0).round(decimals=12)
        pairs.append(merged(score_N, keys_ND.float(), sorted(choose(score_N)), K, neighbours))
    return weighted_reduction(signals, pairs)


def merged(
    score_N: Tensor, keys_ND: Tensor, kept: list[int], K: int, neighbours: int
) -> tuple[list[int], Tensor]:
    """Kept tokens with their neighbours and, for a K more, one of all that was dropped."""
    N, likeness = len(score_N), cosine(keys_ND)
    rows = {}
    for i in kept:
        near = likeness[i].clone()
        near[i] = -torch.inf
        rows[i] = torch.zeros(N, dtype=torch.float64)
        close = highest(near, min(neighbours, N - 1))
        rows[i][close] = score_N[close]
        rows[i][i] = 1
    if len(kept) < K:
        dropped = [i for i in range(N) if i not in rows]
        rest = torch.zeros(N, dtype=torch.float64)
        rest[dropped] = score_N[dropped]
        rows[max(dropped, key=lambda i: (score_N[i].item(), -i))] = rest
    return sorted(rows), torch.stack([rows[i] for i in sorted(rows)])
