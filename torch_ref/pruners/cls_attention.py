"""The K tokens that CLS attends to most, mean over heads: FasterVLM (arXiv:2412.01818).

`layer` is read by the caller, which gives the attention of that layer.
"""

from .contract import Reduction, Signals
from .numerics import keep_highest

needs = {"cls_attention": "layer"}


def prune(signals: Signals, K: int, *, layer: float = -1) -> Reduction:
    return Reduction(keep_highest(signals.cls_attention_BN, K))
