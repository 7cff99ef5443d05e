"""The K longest keys plus queries of one layer (what Vision-Token-Pruning's README describes)."""

from .contract import Reduction, Signals, layer_at
from .numerics import keep_highest

needs: dict[str, str | None] = {"keys": None, "queries": None}


def cuts(layers: int, N: int, K: int, layer: float = 0.5) -> list[tuple[int, str, int]]:
    return [(layer_at(layer, layers), "middle", K)]


def prune(signals: Signals, K: int) -> Reduction:
    lengths = [
        t.double().flatten(2).norm(dim=-1) for t in (signals.keys_BNHd, signals.queries_BNHd)
    ]
    return Reduction(keep_highest((lengths[0] + lengths[1]).round(decimals=12), K))
