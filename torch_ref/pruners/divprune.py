"""DivPrune (arXiv:2503.02175): greedily the token farthest from all kept ones."""

import torch
from torch import Tensor

from .contract import Reduction, Signals, alike, selected


def prune(signals: Signals, K: int) -> Reduction:
    return selected(signals, [spread(1 - alike(x), K) for x in signals.x_BND])


def spread(distance_NN: Tensor, K: int) -> list[int]:
    alone = distance_NN.clone().fill_diagonal_(torch.inf).min(dim=1).values
    kept = [int(alone.argmax())]
    while len(kept) < K:
        nearest = distance_NN[:, kept].min(dim=1).values
        nearest[kept] = -torch.inf
        kept.append(int(nearest.argmax()))
    return sorted(kept)
