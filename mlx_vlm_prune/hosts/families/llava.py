"""LLaVA-1.5: CLIP (or SigLIP) at its last layer but one, two matrices, Llama.

Shapes: I pictures, N patches, K kept, D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ...checkpoints.errors import UserError
from ...pruners.contract import Signals
from ..views import Inputs, View, per_picture
from . import common
from .common import Family, signals
from .inner import counting


def depth(model: Any) -> int:
    """Layers up to the one whose output the features are: -1 is what papers call the last but
    one of CLIP's 24."""
    layers = model.vision_tower.vision_model.encoder.layers
    return range(len(layers) + 1)[model.vision_feature_layer]


def see(model: Any, inputs: Inputs, want: Mapping[str, int | None]) -> list[View]:
    assert inputs.pixels is not None
    return per_picture(inputs, *encode(model, inputs.pixels, want))


def encode(
    model: Any, pixels_I3HW: mx.array, want: Mapping[str, int | None]
) -> tuple[Signals, mx.array]:
    """Signals, and the pixels (I, H, W, 3) as the tower read them."""
    pixels_IHW3 = pixels_I3HW.transpose(0, 2, 3, 1)
    *_, states = model.vision_tower(pixels_IHW3, output_hidden_states=True)
    n, first = depth(model), _first(model)
    layers = model.vision_tower.vision_model.encoder.layers[:n]
    grid = grid_of(model, pixels_IHW3)
    seen = signals(states[n][:, first:], grid, want, layers, states, bool(first))
    return seen, pixels_IHW3


def grid_of(model: Any, pixels_IHW3: mx.array) -> tuple[int, int]:
    patch = model.config.vision_config.patch_size
    return pixels_IHW3.shape[1] // patch, pixels_IHW3.shape[2] // patch


def _first(model: Any) -> int:
    """Where the patches begin: after CLS, if there is one."""
    has_cls = model.vision_tower.model_type == "clip_vision_model"
    if (model.vision_feature_select_strategy == "default") is not has_cls:
        raise UserError(
            f"this {model.config.model_type} model's vision_feature_select_strategy is"
            f" {model.vision_feature_select_strategy!r} over a {model.vision_tower.model_type}:"
            " its visual tokens are not the patches of a grid"
        )
    return int(has_cls)


def project(model: Any, x_1KD: mx.array) -> mx.array:
    return model.multi_modal_projector(x_1KD)


def prepare(
    model: Any,
    processor: Any,
    text: str,
    pictures: Sequence[Image.Image],
    resize_shape: tuple[int, int] | None,
) -> Inputs:
    """The processor's own two calls, made from here: its `__call__` hands the tokenizer's options
    to the image processor, which transformers 5.20 and later refuse (Blaizzy/mlx-vlm#870)."""
    if not pictures:
        return common.prepare(model, processor, text, pictures, resize_shape)
    shown = [_resized(p, resize_shape) for p in pictures]
    made = processor.image_processor(shown)["pixel_values"]
    pixels = mx.array(np.stack([np.asarray(each) for each in made]))
    rows, columns = grid_of(model, pixels.transpose(0, 2, 3, 1))
    marks = text.count(processor.image_token)
    if marks != len(pictures):
        raise UserError(f"the chat template gave {marks} {processor.image_token} marks for"
                        f" {len(pictures)} images")  # fmt: skip
    whole = text.replace(processor.image_token, processor.image_token * (rows * columns))
    words = common.prepare(model, processor, whole, (), None)
    return replace(words, pixels=pixels, images=len(pictures))


def _resized(picture: Image.Image, resize_shape: tuple[int, int] | None) -> Image.Image:
    from mlx_vlm.utils import resize_image

    return picture if resize_shape is None else resize_image(picture, resize_shape)


family = Family(depth, see, project, prepare=prepare, inner=counting)
