"""LLaVA-1.5: CLIP or SigLIP at an inner layer, and two matrices.

Shapes: I pictures, k visual tokens, S tokens with CLS, D features.
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
    return [[one] for one in seen_by(model, pixels_I3HW)]


def seen_by(model: Any, pixels_I3HW: mx.array) -> list[Signals]:
    states, grid = encode(model, pixels_I3HW)
    first = int(model.vision_feature_select_strategy == "default")  # after CLS
    return pictures(states[model.vision_feature_layer][:, first:], grid)


def encode(model: Any, pixels_I3HW: mx.array) -> tuple[Sequence[mx.array], tuple[int, int]]:
    """What every layer makes of the tokens, (I, S, D), and how many patches there are."""
    patch, (H, W) = model.config.vision_config.patch_size, pixels_I3HW.shape[2:]
    *_, states = model.vision_tower(pixels_I3HW.transpose(0, 2, 3, 1), output_hidden_states=True)
    return states, (H // patch, W // patch)


def project(model: Any, x_1kD: mx.array) -> mx.array:
    return model.multi_modal_projector(x_1kD)
