"""Tokens left at each cut of a decoder method, so that the average over all layers is K."""

import math
from collections.abc import Callable, Sequence

from .contract import layer_at


def one_cut(layers: int, N: int, K: int, layer: float) -> dict[int, int]:
    """{layer: tokens left} of one cut: the layers before it hold N, the others share the rest."""
    at = layer_at(layer, layers)
    left = (layers * K - at * N) // (layers - at)
    if left < 1 or at < 1:
        raise ValueError(f"an average of {K} of {N} cannot be had by a cut at layer {at}")
    return {at: left}


def several_cuts(
    layers: int, N: int, K: int, at: Sequence[float], counts: Callable[[float], list[int]]
) -> dict[int, int]:
    """{layer: tokens left} of several cuts, for the largest t that the average allows."""
    places = [layer_at(layer, layers) for layer in at]

    def average(t: float) -> float:
        left, total, held = dict(zip(places, counts(t), strict=True)), 0, N
        for layer in range(layers):
            held = left.get(layer, held)
            total += held
        return total / layers

    if average(0.0) > K:
        raise ValueError(f"an average of {K} of {N} cannot be had by cuts at layers {places}")
    low, high = 0.0, 1.0
    for _ in range(40):
        t = (low + high) / 2
        if average(t) <= K:
            low = t
        else:
            high = t
    return dict(zip(places, counts(low), strict=True))


def cut_and_wipe(
    layers: int, N: int, K: int, layer: float, wipe: float, rank: int = 0
) -> dict[int, int]:
    """{layer: tokens left} of one cut, with none left from `wipe` on: `rank`, or for an average of
    K rounded up, as in TwigVLM."""
    at, end = layer_at(layer, layers), layer_at(wipe, layers)
    if not 1 <= at < end:
        raise ValueError(f"a cut at layer {at} has no room before a wipe at layer {end}")
    left = rank or math.ceil((layers * K - at * N) / (end - at))
    if not 1 <= left <= N:
        raise ValueError(f"an average of {K} of {N} cannot be had between layers {at} and {end}")
    return {at: left, end: 0}


def average_of_rank(layers: int, N: int, layer: float, wipe: float, rank: int) -> int:
    """How many tokens the average layer holds where `rank` go on; the part of one is dropped."""
    cuts, held, total = cut_and_wipe(layers, N, N, layer, wipe, rank), N, 0
    for number in range(layers):
        held = cuts.get(number, held)
        total += held
    return total // layers
