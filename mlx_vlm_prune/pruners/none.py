"""No pruning: every token stays. What all others are measured against."""

from .contract import Reduction, Signals, Stage, identity

stage = Stage.FEATURES


def prune(signals: Signals, K: int) -> Reduction:
    """Keep all N tokens; K must be N."""
    if signals.x_BND.shape[1] != K:
        raise ValueError(f"none keeps all {signals.x_BND.shape[1]} tokens, not {K}")
    return identity(signals.x_BND)
