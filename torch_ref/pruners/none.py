"""No pruning: only K = N is possible, and `reduce` answers that itself."""

from .contract import Reduction, Signals


def prune(signals: Signals, K: int) -> Reduction:
    raise ValueError(f"none keeps all {signals.x_BND.shape[1]} visual tokens, not {K}")
