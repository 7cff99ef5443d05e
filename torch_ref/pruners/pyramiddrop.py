"""PyramidDrop (arXiv:2410.17247): the same share leaves at several depths."""

from .budget import several_cuts
from .contract import Reduction, Signals
from .numerics import keep_highest

needs: dict[str, str | None] = {"next_attention": None}


def schedule(layers: int, N: int, K: int, start: float = 0.25, stages: int = 3) -> dict[int, int]:
    def counts(t: float) -> list[int]:
        return [max(1, int(N * t ** (stage + 1))) for stage in range(stages)]

    at = [start + stage * (1 - start) / stages for stage in range(stages)]
    return several_cuts(layers, N, K, at, counts)


def prune(signals: Signals, K: int) -> Reduction:
    return Reduction(keep_highest(signals.next_attention_BN, K))
