"""PaliGemma: one image by SigLIP, and one matrix.

Shapes: N patches, k kept, D features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from ....pruners.contract import Signals
from .common import hand_over, left, mark, only
from .llava import project

__all__ = ["hand_over", "left", "mark", "project", "see"]


def see(
    model: Any, pixels_13HW: mx.array, ids: Sequence[int], told: Mapping[str, Any]
) -> list[list[Signals]]:
    words = model.language_model.model.embed_tokens
    pixels_1HW3 = only(pixels_13HW).transpose(0, 2, 3, 1).astype(words(mx.array([0])).dtype)
    x_ND, *_ = model.vision_tower(pixels_1HW3, output_hidden_states=True)
    side = int(len(x_ND) ** 0.5)
    return [[Signals(x_ND[None].astype(pixels_13HW.dtype), (side, side))]]
