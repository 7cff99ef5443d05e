"""Budgets: how many tokens K of an image's N stay, by default half; a decoder method's average.

As in the papers, the layers before a decoder method's first cut hold all N tokens.

Shapes: N visual tokens of an image, K kept; for a decoder method in the average layer.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real

from ..checkpoints.errors import UserError
from . import downsample
from .contract import Stage
from .pipeline import Pipeline, layer_at

logger = logging.getLogger("mlx_vlm_prune")
DEFAULT_KEEP_RATIO = 0.5  # of an image's visual tokens, without a budget, in every way in


def tokens_for(N: int, ratio: float) -> int:
    """A share of N tokens as a number: rounded down, at least one."""
    return max(1, int(N * ratio + 1e-9))  # 0.29 * 100 is less than 29


def check_budget(keep_ratio: float | None, keep_tokens: int | None) -> None:
    """Say early what is wrong with a budget, however many tokens an image has. Raises UserError."""
    if keep_ratio is not None and keep_tokens is not None:
        raise UserError("give keep_ratio or keep_tokens, not both")
    is_ratio = isinstance(keep_ratio, Real) and not isinstance(keep_ratio, bool)
    if keep_ratio is not None and not (is_ratio and 0 < keep_ratio <= 1):
        raise UserError(f"keep_ratio is {keep_ratio!r}; it must be above 0 and at most 1")
    is_count = isinstance(keep_tokens, Integral) and not isinstance(keep_tokens, bool)
    if keep_tokens is not None and not (is_count and keep_tokens >= 1):
        raise UserError(f"keep_tokens is {keep_tokens!r}; it must be a whole number, at least 1")


def budget(N: int, keep_ratio: float | None, keep_tokens: int | None, pruner: Pipeline) -> int:
    """K of N tokens: `keep_tokens`, or a share of N; half without either. Raises UserError."""
    check_budget(keep_ratio, keep_tokens)
    if keep_tokens is not None and keep_tokens > N:
        raise UserError(f"keep_tokens is {keep_tokens}; an image has 1 to {N} visual tokens")
    if keep_tokens is None and keep_ratio is None:
        if pruner.trained_tokens:
            return pruner.trained_tokens
        keep_ratio = 1.0 if pruner.spec == "none" else default_keep_ratio(pruner.spec)
    K = tokens_for(N, keep_ratio) if keep_ratio is not None else keep_tokens
    assert K is not None
    if pruner.spec == "none" and K != N:
        raise UserError(f"pruner none keeps all {N} visual tokens; choose another to keep {K}")
    if pruner.trained_tokens and K not in (N, pruner.trained_tokens):
        raise UserError(
            f"this checkpoint's {pruner.spec} was trained for {pruner.trained_tokens} visual"
            f" tokens; it cannot keep {K}"
        )
    return K


@functools.cache
def default_keep_ratio(spec: str) -> float:
    """The share that a method keeps without a budget; it is logged once for each method."""
    logger.warning("%s has no budget and keeps keep_ratio=%g", spec, DEFAULT_KEEP_RATIO)
    return DEFAULT_KEEP_RATIO


def feasible_budgets(pipeline: Pipeline, grid: tuple[int, int], layers: int) -> list[int]:
    """Every K below N that the methods can keep in a language model of so many layers, ascending;
    of a smaller image, those that differ. Raises UserError where there is none."""
    N, step = math.prod(grid), pipeline.decoder
    if N == 1:
        raise UserError("an image is one visual token of this model, so nothing can be pruned")
    if len(pipeline.steps) == 1 and pipeline.at(Stage.IMAGE):
        return sorted({math.prod(downsample.smaller_grid(grid, K)) for K in range(1, N)})
    if not step:
        return list(range(1, N))
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


def one_cut(layers: int, N: int, K: int, layer: float) -> dict[int, int]:
    """{layer: tokens left} of one cut at `layer`. Raises ValueError where none would be left."""
    at = _inside(layer, layers)
    left = (K * layers - at * N) // (layers - at)
    if left < 1:
        raise ValueError(_impossible(K, N, layers, at))
    return {at: left}


def cut_and_wipe(layers: int, N: int, K: int, layer: float, wipe: float) -> dict[int, int]:
    """{layer: tokens left} of a cut at `layer`, with none left from layer `wipe` on.

    TwigVLM rounds up: the average may exceed K by less than one token. Raises ValueError.
    """
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
