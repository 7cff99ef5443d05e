"""A batch as mlx-vlm's tools hand it over, taken apart into prompts with their own images.

Shapes: B prompts, L rows of the longest, N visual tokens of a view, T pictures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from .host import Host
from .prepared_inputs import PreparedInputs
from .views import View


def split_batch(
    host: Host,
    ids_BL: mx.array,
    mask_BL: mx.array | None,
    pixels: Any,
    extra: Mapping[str, Any],
    encode: Callable[[PreparedInputs], list[View]],
) -> list[tuple[int, PreparedInputs, list[View]]]:
    """Where each prompt begins in its padded row, its inputs, and its views by `encode`.

    Raises UserError where the images do not fit the prompts.
    """
    real_BL = np.ones(ids_BL.shape, bool) if mask_BL is None else np.array(mask_BL) != 0
    images, prompts = _images(pixels, extra), []
    for ids_L, real_L in zip(np.array(ids_BL), real_BL, strict=True):
        ids = ids_L[real_L].tolist()
        prompts.append(PreparedInputs(ids, mx.ones((1, len(ids)), mx.int32), pixels, images, extra))
    if len(prompts) == 1:
        parts = [(prompts[0], encode(prompts[0]))]
    elif host.placeholder_unit != "token":
        raise UserError(
            f"a {host.kind} model reads one prompt at a time here: its rows grow by images"
        )
    elif isinstance(pixels, list) or pixels.ndim != 5:
        parts = _dealt(host, prompts, encode(prompts[0]))
    else:  # each prompt's tiles are a row of the pixels
        tiled = [_tiles_of(host, inputs, b) for b, inputs in enumerate(prompts)]
        parts = [(inputs, encode(inputs) if inputs.images else []) for inputs in tiled]
    placed = []
    for real_L, (inputs, views) in zip(real_BL, parts, strict=True):
        if views and "num_patches_list" not in inputs.extra:
            views = host.assign_tiles(inputs, views)
        placed.append((int(real_L.argmax()), inputs, views))
    return placed


def _images(pixels: Any, extra: Mapping[str, Any]) -> int:
    """How many images there are, as far as the arrays tell; tiles are one image at first."""
    for name in ("image_grid_thw", "num_patches_list", "image_sizes"):
        if extra.get(name) is not None:
            return len(extra[name])
    if isinstance(pixels, list):
        return len(pixels)
    return 1 if pixels.ndim in (3, 5) else len(pixels)


def _tiles_of(host: Host, inputs: PreparedInputs, b: int) -> PreparedInputs:
    """The inputs with row b of the pixels; without pixels where the prompt has no image."""
    if host.image_token_id(inputs) not in inputs.ids:
        return replace(inputs, pixels=None, images=0)
    extra = dict(inputs.extra)
    if extra.get("pixel_attention_mask") is not None:
        extra["pixel_attention_mask"] = extra["pixel_attention_mask"][b : b + 1]
    return replace(inputs, pixels=inputs.pixels[b : b + 1], images=1, extra=extra)


def _dealt(
    host: Host, prompts: Sequence[PreparedInputs], views: Sequence[View]
) -> list[tuple[PreparedInputs, list[View]]]:
    """Each prompt with as many views as it has placeholders for."""
    coming, parts = list(views), []
    for inputs in prompts:
        room, taken = inputs.ids.count(host.image_token_id(inputs)), list[View]()
        while coming and sum(v.signals.x_BND.shape[1] for v in taken) < room:
            taken.append(coming.pop(0))
        if not taken:
            parts.append((replace(inputs, pixels=None, images=0, extra={}), taken))
            continue
        first, last = taken[0].image, taken[-1].image
        extra = dict(inputs.extra)
        if extra.get("image_grid_thw") is not None:
            extra["image_grid_thw"] = extra["image_grid_thw"][first : last + 1]
        inputs = replace(inputs, images=last - first + 1, extra=extra)
        parts.append((inputs, [replace(view, image=view.image - first) for view in taken]))
    if coming:
        raise UserError(f"{len(coming)} of {len(views)} pictures have no placeholders in a prompt")
    return parts
