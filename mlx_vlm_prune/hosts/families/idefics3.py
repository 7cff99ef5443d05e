"""Idefics3 and SmolVLM: SigLIP over tiles, of whose patches m x m make one visual token.

Shapes: T tiles, P patches, N visual tokens, K kept, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..views import Inputs, View, per_picture, tiles
from . import common, siglip
from .common import Family


def see(model: Any, inputs: Inputs, want: Mapping[str, int | None]) -> list[View]:
    assert inputs.pixels is not None
    there = mx.array(np.flatnonzero(np.array((inputs.pixels[0] != 0).any(axis=(1, 2, 3)))))
    pixels_T3HW = inputs.pixels[0][there]  # a tile of zeros only fills up a batch
    mask = inputs.extra.get("pixel_attention_mask")
    mask_THW = mx.ones_like(pixels_T3HW[:, 0]) if mask is None else mask[0][there]
    out = model.vision_model(
        pixels_T3HW.transpose(0, 2, 3, 1),
        patch_attention_mask=_patches(mask_THW, model.config.vision_config.patch_size),
        output_hidden_states=True,
    )
    m = model.connector.scale_factor
    seen = siglip.encode(model.vision_model, out, want, m)
    x_TPD = out[0].astype(pixels_T3HW.dtype)
    seen = replace(seen, x_BND=model.connector.pixel_shuffle(x_TPD, m))
    return per_picture(inputs, seen, pixels_T3HW.transpose(0, 2, 3, 1))


def _patches(mask_THW: mx.array, size: int) -> mx.array:
    """Which patches (T, rows, columns) hold a pixel that is not padding."""
    T, rows, columns = len(mask_THW), mask_THW.shape[1] // size, mask_THW.shape[2] // size
    cut = mask_THW[:, : rows * size, : columns * size].reshape(T, rows, size, columns, size)
    return cut.any(axis=(2, 4))


def project(model: Any, x_1KD: mx.array) -> mx.array:
    return model.connector.modality_projection(x_1KD)


def hand_over(
    model: Any, x: Sequence[mx.array], deep: Sequence[Sequence[mx.array]], is_full: bool
) -> dict:
    return {"cached_image_features": mx.concatenate(list(x))}


def prepare(
    model: Any,
    processor: Any,
    text: str,
    pictures: Sequence[Image.Image],
    resize_shape: tuple[int, int] | None,
) -> Inputs:
    """With how many tiles each image was cut into: the last shows all of it, as its mark says."""
    made = common.prepare(model, processor, text, pictures, resize_shape)
    mark = getattr(processor, "global_image_token", "<global-img>")
    whole = processor.tokenizer.convert_tokens_to_ids(mark)
    counts = tiles(made.ids, common.image_token(model, made), whole)
    return replace(made, extra={**made.extra, "num_patches_list": counts})


def embed(model: Any) -> Callable[[mx.array], mx.array]:
    return model.language_model.embed_tokens


def depth(model: Any) -> int:
    return len(model.vision_model.encoder.layers)


family = Family(depth, see, project, hand_over, prepare, embed)
