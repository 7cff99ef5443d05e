"""Idefics3 and SmolVLM: SigLIP over the tiles of each image; m x m patches are a visual token.

Shapes: T tiles, P patches of one, N visual tokens, k kept of all, D features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ....pruners.contract import Signals
from ..parts import GLOBAL_IMAGE
from .common import grouped, left, mark, pictures

__all__ = ["hand_over", "left", "mark", "project", "see"]


def see(
    model: Any, pixels_1T3HW: mx.array, ids: Sequence[int], told: Mapping[str, Any]
) -> list[list[Signals]]:
    there = mx.array(np.flatnonzero(np.array((pixels_1T3HW[0] != 0).any(axis=(1, 2, 3)))))
    pixels_T3HW = pixels_1T3HW[0][there]  # a tile of zeros only fills up a batch
    mask = told.get("pixel_attention_mask")
    mask_THW = mx.ones_like(pixels_T3HW[:, 0]) if mask is None else mask[0][there]
    size = model.config.vision_config.patch_size
    x_TPD, *_ = model.vision_model(
        pixels_T3HW.transpose(0, 2, 3, 1),
        patch_attention_mask=patches(mask_THW, size),
        output_hidden_states=True,
    )
    m = model.connector.scale_factor
    x_TND = model.connector.pixel_shuffle(x_TPD.astype(pixels_T3HW.dtype), m)
    side = int(x_TND.shape[1] ** 0.5)
    return grouped(pictures(x_TND, (side, side)), tiles(ids, mark(model, told)))


def patches(mask_THW: mx.array, size: int) -> mx.array:
    """Which patches (T, rows, columns) hold a pixel that is not padding."""
    T, rows, columns = len(mask_THW), mask_THW.shape[1] // size, mask_THW.shape[2] // size
    cut = mask_THW[:, : rows * size, : columns * size].reshape(T, rows, size, columns, size)
    return cut.any(axis=(2, 4))


def tiles(ids: Sequence[int], placeholder: int) -> list[int]:
    """How many each image was cut into: the last shows all of it, as the token before it says."""
    counts = [0]
    for before, token in zip([-1, *ids], ids, strict=False):
        if token == placeholder and before != placeholder:
            counts[-1] += 1
            counts += [0] if before == GLOBAL_IMAGE else []
    return [n for n in counts if n]


def project(model: Any, x_1kD: mx.array) -> mx.array:
    return model.connector.modality_projection(x_1kD)


def hand_over(model: Any, x_1kD: mx.array, is_full: bool) -> Any:
    return x_1kD[0]
