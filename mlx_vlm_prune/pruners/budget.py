"""Budgets that a method can keep, and what a decoder method leaves at each of its cuts.

As in the papers, the layers before a decoder method's first cut hold all N tokens.

Shapes: N visual tokens of an image, K kept; for a decoder method in the average layer.
"""

import math
from collections.abc import Callable, Sequence

from ..checkpoints.errors import UserError
from . import downsample
from .contract import Stage
from .pipeline import Pipeline, layer_at

MOST_STAGES = 100  # cuts of a method in one language model or tower


def feasible_budgets(pipeline: Pipeline, grid: tuple[int, int], layers: int) -> list[int]:
    """Every K below N that the methods can keep in a language model of so many layers, ascending;
    of a smaller image, those that differ. Raises UserError where there is none."""
    N, step = math.prod(grid), pipeline.decoder
    if N == 1:
        raise UserError("an image is one visual token of this model, so nothing can be pruned")
    if len(pipeline.steps) == 1 and pipeline.at(Stage.IMAGE):
        return sorted({math.prod(downsample.smaller_grid(grid, K)) for K in range(1, N)})
    if not step:  # an earlier method of a chain may leave fewer than K
        return [K for K in range(1, N) if pipeline.budgets(N, K).before_last >= K]
    feasible, refusal = [], None
    for K in range(1, N):
        n = pipeline.budgets(N, K).before_last
        try:
            step.call(step.method.schedule, layers, n, K)
            feasible.append(K)
        except UserError as e:
            refusal = e
    if refusal and not feasible:
        raise refusal
    return feasible


def check_stages(stages: int) -> None:
    """Raises ValueError for a number of cuts that no model has layers for."""
    if not 1 <= stages <= MOST_STAGES:
        raise ValueError(f"stages is {stages}; it is 1 to {MOST_STAGES}")


def one_cut(layers: int, N: int, K: int, layer: float) -> dict[int, int]:
    """{layer: tokens left} of one cut at `layer`. Raises ValueError where none would be left."""
    at = _inside(layer, layers)
    left = (K * layers - at * N) // (layers - at)
    if left < 1:
        raise ValueError(_impossible(K, N, layers, at))
    return {at: left}


def cut_and_wipe(
    layers: int, N: int, K: int, layer: float, wipe: float, rank: int = 0
) -> dict[int, int]:
    """{layer: tokens left} of a cut at `layer`, with none left from layer `wipe` on.

    The cut leaves `rank`, or what K says. TwigVLM rounds that up: the average may exceed K by less
    than one token. Raises ValueError.
    """
    at, end = _cut_and_end(layers, layer, wipe)
    if rank:
        _check_rank(rank, N)
        return {at: rank, end: 0}
    left = -(-(K * layers - at * N) // (end - at))
    if left < 1:
        raise ValueError(_too_few(K, N, layers, at))
    if left > N:
        raise ValueError(
            f"cannot keep {K} of {N} visual tokens in the average of {layers} layers, because those"
            f" from layer {end} on hold none; keep at most {end * N // layers}"
        )
    return {at: left, end: 0}


def average_of_rank(layers: int, N: int, layer: float, wipe: float, rank: int) -> int:
    """How many tokens the average layer holds where `rank` go on at a cut; rounded down, so that
    `cut_and_wipe` leaves as many for this average. Raises ValueError."""
    at, end = _cut_and_end(layers, layer, wipe)
    _check_rank(rank, N)
    return (at * N + rank * (end - at)) // layers


def _cut_and_end(layers: int, layer: float, wipe: float) -> tuple[int, int]:
    at, end = _inside(layer, layers), layer_at(wipe, layers)
    if end <= at:
        raise ValueError(f"wipe is layer {end}; it must come after the cut at layer {at}")
    return at, end


def _check_rank(rank: int, N: int) -> None:
    if not 1 <= rank <= N:
        raise ValueError(f"rank is {rank}; of {N} visual tokens 1 to {N} can go on")


def several_cuts(
    layers: int, N: int, K: int, at: Sequence[float], counts: Callable[[float], Sequence[int]]
) -> dict[int, int]:
    """{layer: tokens left} of cuts at several layers, which leave `counts(t)` tokens for the
    largest t from 0 to 1 with which the average is at most K.

    Where two cuts fall on one layer the later one holds. Raises ValueError.
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
    """Tokens of all layers together."""
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
