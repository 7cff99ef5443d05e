"""Rotary position embedding (RoFormer, arXiv:2104.09864) of queries and keys, half by half.

A GPU has a kernel for it. On a CPU MLX would make the same sines again for each layer, in the
rows' dtype; there a forward pass makes them once, in float32.

Shapes: B prompts, L new rows, H heads, d head size, h half of it.
"""

from collections.abc import Callable
from functools import cache, partial

import mlx.core as mx
import numpy as np

from ...machine.hardware import on_cpu


class RotaryTables:
    """Rotates rows by sines and cosines that are made once."""

    def __init__(self, positions_BL: mx.array, head_dim: int, theta: float):
        rate_h = theta ** (-mx.arange(0, head_dim, 2, dtype=mx.float32) / head_dim)
        angle_B1Lh = positions_BL[:, None, :, None].astype(mx.float32) * rate_h
        cos, sin = mx.cos(angle_B1Lh), mx.sin(angle_B1Lh)
        self.cos_B1Ld = mx.concatenate([cos, cos], axis=-1)
        self.sin_B1Ld = mx.concatenate([-sin, sin], axis=-1)

    def __call__(self, x_BHLd: mx.array) -> mx.array:
        x = x_BHLd.astype(mx.float32)
        a, b = mx.split(x, 2, axis=-1)
        rotated = x * self.cos_B1Ld + mx.concatenate([b, a], axis=-1) * self.sin_B1Ld
        return rotated.astype(x_BHLd.dtype)


class RotaryOffsets:
    """Rotates rows by a `rope` that counts positions from one offset a prompt.

    `contiguous` says that each prompt's positions count up one by one. Where they do not, each row
    is given as a prompt of its own.
    """

    def __init__(self, positions_BL: mx.array, contiguous: bool):
        self.contiguous = contiguous or positions_BL.shape[1] == 1
        self.offset = positions_BL[:, 0] if self.contiguous else positions_BL.flatten()

    def rotate(self, rope: Callable[..., mx.array], x_BHLd: mx.array) -> mx.array:
        """Rotated by `rope`, which takes rows (B, H, L, d) and their `offset` (B,)."""
        if self.contiguous:
            return rope(x_BHLd, offset=self.offset)
        B, H, L, d = x_BHLd.shape
        x_NH1d = x_BHLd.swapaxes(1, 2).reshape(B * L, H, 1, d)
        return rope(x_NH1d, offset=self.offset).reshape(B, L, H, d).swapaxes(1, 2)


def make_rotary(
    positions_BL: mx.array, contiguous: bool, head_dim: int, theta: float
) -> Callable[[mx.array], mx.array]:
    """What rotates queries or keys (B, H, L, d) at these positions."""
    if on_cpu():
        return RotaryTables(positions_BL, head_dim, theta)
    return partial(RotaryOffsets(positions_BL, contiguous).rotate, rope_kernel(head_dim, theta))


def mean_rotation(
    rotate: Callable[[mx.array, mx.array], mx.array], positions_BL: mx.array, head_dim: int
) -> tuple[mx.array, mx.array]:
    """The means of the cosines and of the sines by which `rotate(x_BHLd, positions)` turns pairs of
    features, (B, L) each, whichever features are pairs; of positions (B, L, A) over the axes, too.

    A turn by one position shows which feature of a pair leads: e_i goes to (cos, sin) if i leads,
    to (-sin, cos) if it follows.
    """
    is_flat = positions_BL.ndim == 2
    axes = [positions_BL] if is_flat else mx.split(positions_BL, positions_BL.shape[2], axis=2)
    one_1d = mx.ones((1, head_dim, *positions_BL.shape[2:]), positions_BL.dtype)
    turned_dd = rotate(mx.eye(head_dim)[None, None], one_1d)[0, 0]
    leads_d = (mx.triu(turned_dd, 1) != 0).any(axis=1).astype(mx.float32)
    follows_d = (mx.tril(turned_dd, -1) != 0).any(axis=1).astype(mx.float32)
    cosine_BL, sine_BL = mx.array(0.0), mx.array(0.0)
    for axis_BL in axes:
        at_BL = mx.broadcast_to(axis_BL, positions_BL.shape)
        x_B1Ld = mx.broadcast_to(leads_d, (*positions_BL.shape[:2], head_dim))[:, None]
        x_BLd = rotate(x_B1Ld, at_BL)[:, 0]
        cosine_BL = cosine_BL + (x_BLd * leads_d).sum(axis=-1)
        sine_BL = sine_BL + (x_BLd * follows_d).sum(axis=-1)
    count = leads_d.sum() * len(axes)
    return cosine_BL / count, sine_BL / count


@cache
def rope_kernel(head_dim: int, theta: float) -> Callable[..., mx.array]:
    """MLX's kernel; its `freqs` are wavelengths ÷ 2π."""
    freqs_h = mx.array((theta ** (np.arange(0, head_dim, 2) / head_dim)).astype(np.float32))

    def rope(x_BHLd: mx.array, offset: mx.array) -> mx.array:
        return mx.fast.rope(
            x_BHLd, head_dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=freqs_h
        )

    return rope
