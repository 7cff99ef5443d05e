"""DivPrune (arXiv:2503.02175): greedily the token farthest from all kept ones."""

import torch
from torch import Tensor

from .contract import Reduction, Signals, index_reduction
from .numerics import cosine


def prune(signals: Signals, K: int) -> Reduction:
    distances = [1 - cosine(x_ND) for x_ND in signals.x_BND]
    return index_reduction(signals, [max_min_set(distance_NN, K) for distance_NN in distances])


def max_min_set(distance_NN: Tensor, K: int) -> list[int]:
    return sorted(in_max_min_order(distance_NN, K))


def in_max_min_order(distance_NN: Tensor, K: int) -> list[int]:
    """Each next token is the one whose nearest kept token is farthest."""
    nearest_N = distance_NN.clone().fill_diagonal_(torch.inf).min(dim=1).values
    kept = [int(nearest_N.argmax())]
    while len(kept) < K:
        nearest_N = distance_NN[:, kept].min(dim=1).values
        nearest_N[kept] = -torch.inf
        kept.append(int(nearest_N.argmax()))
    return kept
