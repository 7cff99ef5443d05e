"""LLaVA-PruMerge (arXiv:2403.15388): by CLS attention, each token adding its 32 nearest.

Shapes: N tokens, K kept, D all heads' features.
"""

import torch
from torch import Tensor

from .contract import Reduction, Signals, weighted_reduction
from .numerics import cosine, highest

needs = {"cls_query": "layer", "cls_key": "layer", "keys": "layer"}


def prune(
    signals: Signals, K: int, *, neighbours: int = 32, layer: float = -1, behind: bool = True
) -> Reduction:
    pairs = []
    for b, keys_NHd in enumerate(signals.keys_BNHd):
        score_N = cls_scores(signals, b)
        kept = sorted(highest(score_N, max(1, K - 1)))
        pairs.append(with_sum_of_rest(score_N, keys_NHd, kept, K, neighbours))
    return weighted_reduction(signals, pairs)


def cls_scores(signals: Signals, b: int) -> Tensor:
    """Of a softmax of CLS's query with CLS's key and every other, the others' part, (N,)."""
    keys_SD = torch.cat([signals.cls_key_BHd[b, None], signals.keys_BNHd[b]]).flatten(1).double()
    logits_S = keys_SD @ signals.cls_query_BHd[b].flatten().double() / keys_SD.shape[1] ** 0.5
    return logits_S.softmax(0)[1:].round(decimals=12)


def with_sum_of_rest(
    score_N: Tensor, keys_NHd: Tensor, kept: list[int], K: int, neighbours: int
) -> tuple[list[int], Tensor]:
    """Slots and weights of kept tokens that add their neighbours, and of the sum of the rest."""
    rows = with_neighbours(score_N, keys_NHd, kept, neighbours)
    if K > 1:
        dropped = [i for i in range(len(score_N)) if i not in rows]
        rest_N = torch.zeros_like(score_N)
        rest_N[dropped] = score_N[dropped]
        rows[max(dropped, key=lambda i: (score_N[i].item(), -i))] = rest_N
    return sorted(rows), torch.stack([rows[i] for i in sorted(rows)])


def with_neighbours(
    score_N: Tensor, keys_NHd: Tensor, kept: list[int], neighbours: int
) -> dict[int, Tensor]:
    """Of each kept token its weights (N,): itself, and its neighbours by their scores."""
    similar_NN = cosine(keys_NHd.flatten(1).float())
    rows = {}
    for i in kept:
        similar_N = similar_NN[i].clone()
        similar_N[i] = -torch.inf
        nearest = highest(similar_N, min(neighbours, len(score_N) - 1))
        rows[i] = torch.zeros_like(score_N)
        rows[i][nearest] = score_N[nearest]
        rows[i][i] = 1
    return rows
