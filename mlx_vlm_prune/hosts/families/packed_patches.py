"""Patches of images in one row, as Qwen's towers read them, and the heads of their attention.

Shapes: S patches of all images, U visual tokens of m x m patches each, D features, a angles,
H heads, d head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class PackedPatches:
    """The patches of all images in the tower's order."""

    x_SD: mx.array
    angles_Sa: mx.array  # of rotation
    bounds: Callable[[int], mx.array]  # of a layer: where each window of attention begins
    order_U: np.ndarray  # the visual token, counted over images, at each place


def heads(block: Any, x_SD: mx.array, angles_Sa: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Queries and keys, rotated as in the block, and values, (H, S, d) each."""
    qkv = block.attn.qkv(block.norm1(x_SD)).reshape(len(x_SD), 3, block.attn.num_heads, -1)
    q_SHd, k_SHd = (rotate(qkv[:, i], angles_Sa) for i in range(2))
    return q_SHd.swapaxes(0, 1), k_SHd.swapaxes(0, 1), qkv[:, 2].swapaxes(0, 1)


def rotate(x_SHd: mx.array, angles_Sa: mx.array) -> mx.array:
    """Rotate features in pairs (i, i + d / 2)."""
    cos, sin = (mx.tile(f(angles_Sa)[:, None], (1, 1, 2)) for f in (mx.cos, mx.sin))
    half = x_SHd.shape[-1] // 2
    crossed = mx.concatenate([-x_SHd[..., half:], x_SHd[..., :half]], axis=-1)
    return (x_SHd * cos + crossed * sin).astype(x_SHd.dtype)
