"""Budgets in the decoder: how many rows stay where, so that the average over layers is K.

As the papers count: the layers before the first cut hold all N rows.
Shapes: N visual tokens of an image, K of them in the average layer.
"""

from collections.abc import Callable, Sequence

from .pipeline import layer_at


def one_cut(layers: int, N: int, K: int, layer: float) -> dict[int, int]:
    """After a single cut at `layer`."""
    at = _inside(layer, layers)
    left = (K * layers - at * N) // (layers - at)
    if left < 1:
        raise ValueError(_impossible(K, N, layers, at))
    return {at: left}


def cut_and_wipe(layers: int, N: int, K: int, layer: float, wipe: float) -> dict[int, int]:
    """After a cut at `layer`, with none left from `wipe` on. TwigVLM rounds up: the average
    may be above K by a part of one row."""
    at, end = _inside(layer, layers), layer_at(wipe, layers)
    if end <= at:
        raise ValueError(f"wipe is layer {end}; it must come after the cut at layer {at}")
    left = -(-(K * layers - at * N) // (end - at))
    if left < 1:
        raise ValueError(_too_few(K, N, layers, at))
    if left > N:
        raise ValueError(
            f"cannot keep {K} of {N} visual tokens in the average of {layers} layers, because those"
            f" from layer {end} on hold none; keep at most {end * N // layers}"
        )
    return {at: left, end: 0}


def several_cuts(
    layers: int, N: int, K: int, at: Sequence[float], counts: Callable[[float], Sequence[int]]
) -> dict[int, int]:
    """After several cuts: the largest t of 0 to 1 whose `counts(t)` keep the average at K.

    Where two cuts fall on one layer the later one holds.
    """
    places = [_inside(layer, layers) for layer in at]
    low, high = 0.0, 1.0
    if _total(layers, N, places, counts(low)) > K * layers:
        raise ValueError(_impossible(K, N, layers, places[0]))
    for _ in range(40):
        middle = (low + high) / 2
        fits = _total(layers, N, places, counts(middle)) <= K * layers
        low, high = (middle, high) if fits else (low, middle)
    return dict(zip(places, counts(low), strict=True))


def _inside(layer: float, layers: int) -> int:
    at = layer_at(layer, layers)
    if not at:
        raise ValueError("layer is 0; rows leave after layer 0 at the earliest, so give 1")
    return at


def _total(layers: int, N: int, places: Sequence[int], counts: Sequence[int]) -> int:
    """Rows of all layers together."""
    held = [N] * layers
    for at, left in zip(places, counts, strict=True):
        held[at:] = [left] * (layers - at)
    return sum(held)


def _impossible(K: int, N: int, layers: int, at: int) -> str:
    return f"{_too_few(K, N, layers, at)}, or cut earlier"


def _too_few(K: int, N: int, layers: int, at: int) -> str:
    return (
        f"cannot keep {K} of {N} visual tokens in the average of {layers} layers, because those"
        f" before layer {at} hold all; keep more than {at * N // layers}"
    )
