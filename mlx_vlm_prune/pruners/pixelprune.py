"""Drop the patches whose pixels follow from those of their left and upper neighbours.

PixelPrune, arXiv:2604.00886. Of a patch X with left, upper and upper left neighbours A,
B and C the prediction is B where C is like A and not like B (an edge runs across),
else A: the causal rule of lossless image coding. A patch that is predicted exactly adds
nothing new.

Above tolerance 0 a patch that is predicted counts from then on as its prediction, so that
small differences do not add up from patch to patch (the authors' "anchored" mode, their default).

As the authors' code (github.com/OPPO-Mente-Lab/PixelPrune@a870e31), whose tolerance is 0 too.
Differs: they drop every patch predicted to within a tolerance, so that the image decides how many
stay, here the K worst predicted stay: the same ones where K is their number; they do it before the
tower, in groups of 2 x 2, here single patches, before the first layer.

Above tolerance 0 one patch after another is looked at, so on a GPU pixels return to the host, once.

Options:
    tolerance: largest difference of two patches' preprocessed pixel values at which they are
        alike, 0 or more

Shapes: B images, N patches of P pixel values, K kept.
"""

import mlx.core as mx
import numpy as np

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
    anchored = tolerance > 0
    error_BN = anchored_errors(signals, tolerance) if anchored else prediction_errors(signals)
    return Reduction(keep_highest(error_BN, K), score_BN=error_BN)


def prediction_errors(signals: Signals) -> mx.array:
    """The largest difference of each patch to its prediction, (B, N), at tolerance 0."""
    B, N, P = signals.pixels_BND.shape
    x = signals.pixels_BND.astype(mx.float32).reshape(B, *signals.grid, P)
    left = mx.concatenate([x[:, :, :1], x[:, :, :-1]], axis=2)
    up = mx.concatenate([x[:, :1], x[:, :-1]], axis=1)
    corner = mx.concatenate([up[:, :, :1], up[:, :, :-1]], axis=2)
    is_edge = (largest_difference(corner, left) <= 0) & (largest_difference(corner, up) > 0)
    error = mx.where(is_edge, largest_difference(x, up), largest_difference(x, left))
    error[:, :, 0] = largest_difference(x, up)[:, :, 0]
    error[:, 0] = largest_difference(x, left)[:, 0]
    error[:, 0, 0] = mx.inf  # nothing predicts the first
    return error.reshape(B, N)


def anchored_errors(signals: Signals, tolerance: float) -> mx.array:
    """The same, each patch that is predicted in the place of its prediction."""
    x_BNP: np.ndarray = np.array(signals.pixels_BND.astype(mx.float32))  # becomes the predictions
    columns, error_BN = signals.grid[1], np.full(x_BNP.shape[:2], np.inf, np.float32)
    for i in range(1, x_BNP.shape[1]):
        row, column = divmod(i, columns)
        predicted_BP = x_BNP[:, i - 1 if column else i - columns]
        if row and column:
            up_BP, corner_BP = x_BNP[:, i - columns], x_BNP[:, i - columns - 1]
            is_like_left_B = np.abs(corner_BP - predicted_BP).max(axis=-1) <= tolerance
            is_edge_B = is_like_left_B & (np.abs(corner_BP - up_BP).max(axis=-1) > tolerance)
            predicted_BP = np.where(is_edge_B[:, None], up_BP, predicted_BP)
        error_BN[:, i] = np.abs(x_BNP[:, i] - predicted_BP).max(axis=-1)
        is_predicted_B = error_BN[:, i] <= tolerance
        x_BNP[:, i] = np.where(is_predicted_B[:, None], predicted_BP, x_BNP[:, i])
    return mx.array(error_BN)


def largest_difference(x: mx.array, y: mx.array) -> mx.array:
    """The largest difference between the pixel values of two patches."""
    return mx.abs(x - y).max(axis=-1)
