"""DocPrune's first stage (arXiv:2604.22281): the patches with the most ink stay.

Shapes: N patches of P pixels.
"""

from collections import Counter

import torch
from torch import Tensor

from .contract import Reduction, Signals
from .numerics import keep_highest

needs: dict[str, str | None] = {"grey": None}
LEVEL = 0.0146  # of 1 / 255 and CLIP's deviation


def cuts(layers: int, N: int, K: int) -> list[tuple[int, str, int]]:
    return [(0, "before", K)]


def leaves(N: int, K: int, share: float = 0.64) -> int:
    return max(K, int(N * share))


def prune(signals: Signals, K: int, level: float = LEVEL, tolerance: int = 16) -> Reduction:
    level_BNP = (signals.grey_BNP.double().round(decimals=12) / level).round().long()
    return Reduction(keep_highest(torch.stack([ink(x, tolerance) for x in level_BNP]), K))


def ink(level_NP: Tensor, tolerance: int) -> Tensor:
    """The share of each patch's pixels that are off the background, (N,)."""
    counts = Counter(level_NP.flatten().tolist())
    background = min(counts, key=lambda level: (-counts[level], level))
    return ((level_NP - background).abs() > tolerance).double().mean(1)
