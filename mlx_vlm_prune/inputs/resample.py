"""Make an array of pixels, or of position embeddings, smaller.

Shapes: B images, H and W before, C channels.
"""

import mlx.core as mx
import numpy as np


def shrunk(x_BHWC: mx.array, size: tuple[int, int]) -> mx.array:
    """Resize to (rows, columns), both at most H and W, each new value a triangle-weighted
    mean of what it covers (Pillow's BILINEAR)."""
    for axis, after in zip((1, 2), size, strict=True):
        if x_BHWC.shape[axis] != after:
            mix = mx.array(triangle(x_BHWC.shape[axis], after)).astype(x_BHWC.dtype)
            x_BHWC = mx.moveaxis(mx.moveaxis(x_BHWC, axis, -1) @ mix.T, -1, axis)
    return x_BHWC


def triangle(before: int, after: int) -> np.ndarray:
    """Weights (after, before) of each old value in each new one; rows sum to 1."""
    assert 1 <= after <= before
    scale = before / after
    middle = (np.arange(after) + 0.5)[:, None] * scale
    distance = np.abs(np.arange(before) + 0.5 - middle) / scale
    weight = np.maximum(0, 1 - distance)
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)
