"""The K tokens with the longest features (L2 norm)."""

from .contract import Reduction, Signals
from .numerics import keep_highest


def prune(signals: Signals, K: int) -> Reduction:
    return Reduction(keep_highest(signals.x_BND.double().square().sum(-1), K))
