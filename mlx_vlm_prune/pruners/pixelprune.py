"""Drop the patches whose pixels follow from those of their left and upper neighbours.

PixelPrune, arXiv:2604.00886. Of a patch X with left, upper and upper left neighbours A,
B and C the prediction is B where C is like A and not like B (an edge runs across),
else A: the causal rule of lossless image coding. A patch that is predicted exactly adds
nothing new.

Differs from the authors' code: they drop every patch predicted to within a tolerance,
so that the image decides how many stay; here the K worst predicted stay. They do it
before the tower, in groups of 2 x 2; here single patches, before the first layer.

Options:
    tolerance: largest difference of two patches' preprocessed pixel values at which they are
        alike, 0 or more

Shapes: B images, N patches of P pixel values, K kept.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage
from .numerics import keep_highest

stage = Stage.ENCODER
needs: dict[str, str | None] = {"pixels": None, "grid": None}


def cuts(layers: int, N: int, K: int) -> list[tuple[int, str, int]]:
    """Once, before the first layer."""
    return [(0, "before", K)]


def prune(signals: Signals, K: int, *, tolerance: float = 0.0) -> Reduction:
    """Keep the K patches with the largest prediction error."""
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; it must be 0 or more")
    B, N, P = signals.pixels_BND.shape
    x = signals.pixels_BND.astype(mx.float32).reshape(B, *signals.grid, P)
    left = mx.concatenate([x[:, :, :1], x[:, :, :-1]], axis=2)
    up = mx.concatenate([x[:, :1], x[:, :-1]], axis=1)
    corner = mx.concatenate([up[:, :, :1], up[:, :, :-1]], axis=2)
    is_like_left = largest_difference(corner, left) <= tolerance
    is_edge = is_like_left & (largest_difference(corner, up) > tolerance)
    error = mx.where(is_edge, largest_difference(x, up), largest_difference(x, left))
    error[:, :, 0] = largest_difference(x, up)[:, :, 0]
    error[:, 0] = largest_difference(x, left)[:, 0]
    error[:, 0, 0] = mx.inf  # nothing predicts the first
    return Reduction(index_BK=keep_highest(error.reshape(B, N), K))


def largest_difference(x: mx.array, y: mx.array) -> mx.array:
    """The largest difference between the pixel values of two patches."""
    return mx.abs(x - y).max(axis=-1)
