"""The K tokens with the longest features (L2 norm)."""

from .contract import Reduction, Signals, top


def prune(signals: Signals, K: int) -> Reduction:
    return Reduction(top(signals.x_BND.double().square().sum(-1), K))
