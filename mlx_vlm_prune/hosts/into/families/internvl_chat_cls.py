"""InternVL, and what its CLS attends to: of a visual token, the mean over its patches.

Shapes: T tiles, S tokens with CLS, N visual tokens of m x m patches, D features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx_vlm.models.base import pixel_shuffle

from ....pruners.contract import Signals
from ...families.internvl_chat import _queries_and_keys
from ..parts import layer_of
from .common import attended, cls_attention, grouped, hand_over, left
from .internvl_chat import as_read, mark, project, tiles

__all__ = ["hand_over", "left", "mark", "project", "see"]


def see(
    model: Any, pixels: mx.array, ids: Sequence[int], told: Mapping[str, Any]
) -> list[list[Signals]]:
    tower, m = model.vision_model, int(1 / model.downsample_ratio)
    pixels_THW3 = as_read(model, pixels)
    x_TSD, _, after = tower(pixels_THW3, output_hidden_states=True)
    at = layer_of(len(tower.encoder.layers))
    states = [tower.embeddings(pixels_THW3), *after] if at == 0 else [None, *after]
    seen_TP = cls_attention(*_queries_and_keys(tower.encoder.layers[at], states[at]))
    x_TND = pixel_shuffle(x_TSD[:, 1:], shuffle_ratio=model.downsample_ratio)
    side = int(x_TND.shape[1] ** 0.5)
    seen_TN = seen_TP.reshape(len(x_TND), side, m, side, m).mean(axis=(2, 4)).flatten(1)
    return grouped(attended(x_TND, (side, side), seen_TN), tiles(told, len(x_TND)))
