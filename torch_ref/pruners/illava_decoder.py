"""iLLaVA's decoder part (arXiv:2412.06263): at three depths, by the last token's attention."""

from .budget import several_cuts
from .contract import Reduction, Signals, layer_at
from .illava_tower import recycle

needs: dict[str, str | None] = {"last_attention": None}


def schedule(
    layers: int, N: int, K: int, start: float = 0.07, end: float = 0.5, stages: int = 3
) -> dict[int, int]:
    first, last = layer_at(start, layers), layer_at(end, layers)
    at = [first + i * (last - first) // max(1, stages - 1) for i in range(stages)]

    def left(t: float) -> list[int]:
        fewest = max(1, int(t * N))
        return [N - (i + 1) * (N - fewest) // stages for i in range(stages)]

    return several_cuts(layers, N, K, at, left)


def prune(signals: Signals, K: int, recycled: float = 0.05) -> Reduction:
    return recycle(signals, signals.last_attention_BN, K, recycled)
