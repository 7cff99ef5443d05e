"""Gemma 3 and PaliGemma: SigLIP, without CLS; Gemma 3 makes one visual token of m x m patches.

Shapes: I pictures, N visual tokens of m x m patches, P patches, K kept, D features.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ...checkpoints.errors import UserError
from ...projector import merged
from ..views import Inputs, View, per_picture
from .common import Family, embed, signals


def encode(
    tower: Any,
    out: tuple[mx.array, Any, tuple[mx.array, ...]],
    want: Mapping[str, int | None],
    m: int,
) -> Any:
    """Signals of blocks of m x m patches; the tokens still side by side."""
    x_IPD, _, states = out
    side = int(states[0].shape[1] ** 0.5)
    seen = signals(x_IPD, (side, side), want, tower.encoder.layers, states, has_cls=False)
    return merged(seen, (m, m))


def gemma3_see(model: Any, inputs: Inputs, want: Mapping[str, int | None]) -> list[View]:
    """The projector's mean over blocks comes first: it is what a visual token is made of."""
    assert inputs.pixels is not None
    pixels_IHW3 = _as_words(model, inputs.pixels)
    out = model.vision_tower(pixels_IHW3, output_hidden_states=True)
    joint = model.multi_modal_projector
    seen = encode(model.vision_tower.vision_model, out, want, joint.kernel_size)
    side = joint.patches_per_image
    x_IHWD = joint.avg_pool(out[0].reshape(len(out[0]), side, side, -1))
    return per_picture(inputs, seen.replace(x_BND=x_IHWD.flatten(1, 2)), pixels_IHW3)


def gemma3_project(model: Any, x_1KD: mx.array) -> mx.array:
    joint = model.multi_modal_projector
    y_1KD = joint.mm_soft_emb_norm(x_1KD) @ joint.mm_input_projection_weight
    return y_1KD.astype(x_1KD.dtype)


def paligemma_see(model: Any, inputs: Inputs, want: Mapping[str, int | None]) -> list[View]:
    if inputs.images > 1:
        raise UserError("a paligemma model reads one image here: mlx-vlm shows it the first only")
    assert inputs.pixels is not None
    pixels_IHW3 = _as_words(model, inputs.pixels)
    x_PD, rest, states = model.vision_tower(pixels_IHW3, output_hidden_states=True)
    x_1PD = x_PD[None].astype(inputs.pixels.dtype)
    seen = encode(model.vision_tower.vision_model, (x_1PD, rest, states), want, 1)
    return per_picture(inputs, seen, pixels_IHW3)


def paligemma_project(model: Any, x_1KD: mx.array) -> mx.array:
    return model.multi_modal_projector(x_1KD)


def _as_words(model: Any, pixels_I3HW: mx.array) -> mx.array:
    """(I, H, W, 3), in the dtype that words have."""
    return pixels_I3HW.transpose(0, 2, 3, 1).astype(embed(model)(mx.array([0])).dtype)


def _depth(model: Any) -> int:
    return len(model.vision_tower.vision_model.encoder.layers)


gemma3 = Family(_depth, gemma3_see, gemma3_project)
paligemma = Family(_depth, paligemma_see, paligemma_project)
