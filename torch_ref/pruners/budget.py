"""Rows at each cut in the decoder, so that the average over all layers is K."""

from collections.abc import Callable, Sequence

from .contract import number


def single(layers: int, N: int, K: int, layer: float) -> dict[int, int]:
    """One cut: the layers before it hold N rows, the others share the rest evenly."""
    at = number(layer, layers)
    left = (layers * K - at * N) // (layers - at)
    if left < 1 or at < 1:
        raise ValueError(f"an average of {K} of {N} cannot be had by a cut at layer {at}")
    return {at: left}


def several(
    layers: int, N: int, K: int, at: Sequence[float], counts: Callable[[float], list[int]]
) -> dict[int, int]:
    """Several cuts, as generous (t from 0 to 1) as the average allows."""
    where = [number(layer, layers) for layer in at]

    def average(t: float) -> float:
        plan, rows, now = dict(zip(where, counts(t), strict=True)), 0, N
        for layer in range(layers):
            now = plan.get(layer, now)
            rows += now
        return rows / layers

    if average(0.0) > K:
        raise ValueError(f"an average of {K} of {N} cannot be had by cuts at layers {where}")
    low, high = 0.0, 1.0
    for _ in range(40):
        t = (low + high) / 2
        if average(t) <= K:
            low = t
        else:
            high = t
    return dict(zip(where, counts(low), strict=True))
