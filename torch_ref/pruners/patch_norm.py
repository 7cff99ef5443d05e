"""The K longest patch embeddings, chosen before the first layer (Vision-Token-Pruning's code)."""

from .contract import Reduction, Signals
from .numerics import keep_highest

needs: dict[str, str | None] = {"patches": None}


def cuts(layers: int, N: int, K: int) -> list[tuple[int, str, int]]:
    return [(0, "before", K)]


def prune(signals: Signals, K: int) -> Reduction:
    return Reduction(keep_highest(signals.patches_BND.double().square().sum(-1), K))
