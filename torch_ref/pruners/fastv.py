"""FastV (arXiv:2403.06764): after layer 2, by the attention of the prompt's last token."""

from .budget import one_cut
from .contract import Reduction, Signals
from .numerics import keep_highest

needs: dict[str, str | None] = {"last_attention": None}


def schedule(layers: int, N: int, K: int, layer: float = 2 / 32) -> dict[int, int]:
    return one_cut(layers, N, K, layer)


def prune(signals: Signals, K: int) -> Reduction:
    return Reduction(keep_highest(signals.last_attention_BN, K))
