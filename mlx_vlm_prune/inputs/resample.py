"""Resize pixels or position embeddings to a smaller grid.

Shapes: B images, H and W before, C channels.
"""

import mlx.core as mx
import numpy as np


def shrink(x_BHWC: mx.array, size: tuple[int, int]) -> mx.array:
    """Resize to (rows, columns), at most H and W.

    Each new value is a triangle-weighted mean of those it covers (Pillow's BILINEAR).
    """
    for axis, after in zip((1, 2), size, strict=True):
        before = x_BHWC.shape[axis]
        if before != after:
            weights = mx.array(triangle_weights(before, after)).astype(x_BHWC.dtype)
            x_BHWC = mx.moveaxis(mx.moveaxis(x_BHWC, axis, -1) @ weights.T, -1, axis)
    return x_BHWC


def triangle_weights(before: int, after: int) -> np.ndarray:
    """Weights (after, before) of each old value in each new one; rows sum to 1."""
    assert 1 <= after <= before
    scale = before / after
    middle = (np.arange(after) + 0.5)[:, None] * scale
    distance = np.abs(np.arange(before) + 0.5 - middle) / scale
    weight = np.maximum(0, 1 - distance)
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)
