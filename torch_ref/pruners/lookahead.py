"""Hi-Lo Prune's other stages (CVPR 2026): leaving tokens are attended to more until they leave."""

import math

import torch
from torch import Tensor

from .budget import one_cut
from .contract import Reduction, Signals, index_reduction
from .divprune import max_min_set
from .numerics import cosine

needs: dict[str, str | None] = {"entrance": None}


def schedule(layers: int, N: int, K: int, layer: float = 2 / 32) -> dict[int, int]:
    return one_cut(layers, N, K, layer)


def prune(signals: Signals, K: int) -> Reduction:
    kept = [max_min_set(1 - cosine(x_ND), K) for x_ND in signals.entrance_BND]
    return index_reduction(signals, kept)


def entry_bias(signals: Signals, K: int, boost: int = 1) -> Tensor:
    """Added to the attention that each token gets, (B, N)."""
    kept = prune(signals, K).index_BK
    assert kept is not None
    bias_BN = torch.full(signals.x_BND.shape[:2], math.log1p(boost))
    return bias_BN.scatter(1, kept, 0.0)
