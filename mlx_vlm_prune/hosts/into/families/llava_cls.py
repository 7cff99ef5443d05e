"""LLaVA-1.5 with CLIP, and what its CLS attends to.

Shapes: I pictures, N patches, S tokens with CLS, D features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from ....pruners.contract import Signals
from ...families.common import queries_and_keys
from ..parts import layer_of
from .common import attended, cls_attention, hand_over, left, mark
from .llava import encode, project

__all__ = ["hand_over", "left", "mark", "project", "see"]


def see(
    model: Any, pixels_I3HW: mx.array, ids: Sequence[int], told: Mapping[str, Any]
) -> list[list[Signals]]:
    return [[one] for one in seen_by(model, pixels_I3HW)]


def seen_by(model: Any, pixels_I3HW: mx.array) -> list[Signals]:
    states, grid = encode(model, pixels_I3HW)
    layers = model.vision_tower.vision_model.encoder.layers
    used = range(len(layers) + 1)[model.vision_feature_layer]
    at = layer_of(used)
    seen_IN = cls_attention(*queries_and_keys(layers[at], states[at]))
    return attended(states[used][:, 1:], grid, seen_IN)
