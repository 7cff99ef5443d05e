"""The K tokens that receive most attention, mean over heads and queries (FastVLM pruning's ATS)."""

from .contract import Reduction, Signals
from .numerics import keep_highest

needs = {"received_attention": "layer"}


def prune(signals: Signals, K: int, *, layer: float = -1) -> Reduction:
    return Reduction(keep_highest(signals.received_attention_BN, K))
