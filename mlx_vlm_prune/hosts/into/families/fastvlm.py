"""FastVLM: one image, a convolutional tower, and one placeholder for all that it gives.

Shapes: H x W cells, C channels, k visual tokens, L rows of the prompt, D features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from ....pruners.contract import Reduction, Signals
from .common import mark, only

__all__ = ["hand_over", "left", "mark", "project", "see"]


def see(
    model: Any, pixels_13HW: mx.array, ids: Sequence[int], told: Mapping[str, Any]
) -> list[list[Signals]]:
    dtype = model.vision_tower.vision_model.patch_embed.blocks[0].reparam_conv.weight.dtype
    pixels_1HW3 = only(pixels_13HW).astype(dtype).transpose(0, 2, 3, 1)
    _, x_1HWC, _ = model.vision_tower(pixels_1HW3)
    return [[Signals(x_1HWC.flatten(1, 2), x_1HWC.shape[1:3])]]


def left(
    ids: Sequence[int], placeholder: int, seen: Sequence[Signals], kept: Sequence[Reduction]
) -> mx.array:
    """All rows (L,): mlx-vlm puts what it is given in place of the placeholder."""
    return mx.arange(len(ids))


def project(model: Any, x_1kD: mx.array) -> mx.array:
    return model.mm_projector(x_1kD)


def hand_over(model: Any, x_1kD: mx.array, is_full: bool) -> Any:
    return x_1kD
