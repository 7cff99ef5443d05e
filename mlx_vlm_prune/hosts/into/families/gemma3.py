"""Gemma 3: SigLIP, of whose patches the projector first makes fewer, by their mean over blocks.

Shapes: I pictures, P patches, N visual tokens, k kept of all, D features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from ....pruners.contract import Signals
from .common import hand_over, left, mark, pictures

__all__ = ["hand_over", "left", "mark", "project", "see"]


def see(
    model: Any, pixels_I3HW: mx.array, ids: Sequence[int], told: Mapping[str, Any]
) -> list[list[Signals]]:
    words, joint = model.language_model.model.embed_tokens, model.multi_modal_projector
    pixels_IHW3 = pixels_I3HW.transpose(0, 2, 3, 1).astype(words(mx.array([0])).dtype)
    x_IPD, *_ = model.vision_tower(pixels_IHW3, output_hidden_states=True)
    side = joint.patches_per_image
    x_IHWD = joint.avg_pool(x_IPD.reshape(len(x_IPD), side, side, -1))
    return [[one] for one in pictures(x_IHWD.flatten(1, 2), x_IHWD.shape[1:3])]


def project(model: Any, x_1kD: mx.array) -> mx.array:
    joint = model.multi_modal_projector
    y_1kD = joint.mm_soft_emb_norm(x_1kD) @ joint.mm_input_projection_weight
    return y_1kD.astype(x_1kD.dtype)
