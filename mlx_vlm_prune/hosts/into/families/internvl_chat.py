"""InternVL: InternViT over the tiles of each image; 2 x 2 patches make one visual token.

Shapes: T tiles, S tokens with CLS, N visual tokens, k kept of all, D features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx_vlm.models.base import pixel_shuffle

from ....pruners.contract import Signals
from .common import grouped, hand_over, left, pictures

__all__ = ["hand_over", "left", "mark", "project", "see"]


def see(
    model: Any, pixels: mx.array, ids: Sequence[int], told: Mapping[str, Any]
) -> list[list[Signals]]:
    x_TSD, *_ = model.vision_model(as_read(model, pixels), output_hidden_states=True)
    x_TND = pixel_shuffle(x_TSD[:, 1:], shuffle_ratio=model.downsample_ratio)
    side = int(x_TND.shape[1] ** 0.5)
    return grouped(pictures(x_TND, (side, side)), tiles(told, len(x_TND)))


def as_read(model: Any, pixels: mx.array) -> mx.array:
    """(T, H, W, 3), in the tower's dtype."""
    pixels_T3HW = pixels[0] if pixels.ndim == 5 else pixels
    dtype = model.vision_model.embeddings.patch_embedding.weight.dtype
    return pixels_T3HW.astype(dtype).transpose(0, 2, 3, 1)


def tiles(told: Mapping[str, Any], T: int) -> list[int]:
    """How many each image was cut into."""
    return [int(n) for n in told.get("num_patches_list", [T])]


def mark(model: Any, told: Mapping[str, Any]) -> int:
    """The id of the placeholder, which the processor knows better than the configuration."""
    return told.get("image_token_index", model.config.image_token_index)


def project(model: Any, x_1kD: mx.array) -> mx.array:
    for layer in model.mlp1:
        x_1kD = layer(x_1kD)
    return x_1kD
