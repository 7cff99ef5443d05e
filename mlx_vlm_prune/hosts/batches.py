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
from .views import Inputs, View

Encode = Callable[[Inputs], list[View]]


def taken_apart(
    host: Host,
    ids_BL: mx.array,
    mask_BL: mx.array | None,
    pixels: Any,
    extra: Mapping[str, Any],
    encode: Encode,
) -> list[tuple[int, Inputs, list[View]]]:
    """Where each prompt begins in its padded row, its inputs, and its views by `encode`.

    Raises UserError where the images do not fit the prompts.
    """
    real_BL = np.ones(ids_BL.shape, bool) if mask_BL is None else np.array(mask_BL) != 0
    prompts = [
        (int(real_L.argmax()), _inputs(np.array(ids_L)[real_L].tolist(), pixels, extra))
        for ids_L, real_L in zip(ids_BL, real_BL, strict=True)
    ]
    if len(prompts) == 1:
        begin, inputs = prompts[0]
        return [(begin, inputs, host.assign_tiles(inputs, encode(inputs)))]
    if host.placeholders != "token":
        raise UserError(
            f"a {host.kind} model reads one prompt at a time here: its rows grow by images"
        )
    if isinstance(pixels, list) or pixels.ndim != 5:
        return _dealt(host, prompts, encode(prompts[0][1]))
    parts = []  # each prompt's tiles are a row of the pixels
    for b, (begin, inputs) in enumerate(prompts):
        inputs = _tiles_of(host, inputs, b)
        views = encode(inputs) if inputs.pixels is not None else []
        parts.append((begin, inputs, host.assign_tiles(inputs, views)))
    return parts


def _inputs(ids: list[int], pixels: Any, extra: Mapping[str, Any]) -> Inputs:
    mask_1L = mx.ones((1, len(ids)), mx.int32)
    return Inputs(ids, mask_1L, pixels, _images(pixels, extra), extra)


def _images(pixels: Any, extra: Mapping[str, Any]) -> int:
    """How many images there are, as far as the arrays tell; tiles are one image at first."""
    for name in ("image_grid_thw", "num_patches_list", "image_sizes"):
        if extra.get(name) is not None:
            return len(extra[name])
    if isinstance(pixels, list):
        return len(pixels)
    return 1 if pixels.ndim in (3, 5) else len(pixels)


def _tiles_of(host: Host, inputs: Inputs, b: int) -> Inputs:
    """The inputs with row b of the pixels; without pixels where the prompt has no image."""
    if host.image_token_id(inputs) not in inputs.ids:
        return replace(inputs, pixels=None, images=0)
    extra = dict(inputs.extra)
    if extra.get("pixel_attention_mask") is not None:
        extra["pixel_attention_mask"] = extra["pixel_attention_mask"][b : b + 1]
    return replace(inputs, pixels=inputs.pixels[b : b + 1], images=1, extra=extra)


def _dealt(
    host: Host, prompts: Sequence[tuple[int, Inputs]], views: Sequence[View]
) -> list[tuple[int, Inputs, list[View]]]:
    """Each prompt with as many views as it has placeholders for."""
    coming, parts = list(views), []
    for begin, inputs in prompts:
        room, taken = inputs.ids.count(host.image_token_id(inputs)), list[View]()
        while coming and sum(v.signals.x_BND.shape[1] for v in taken) < room:
            taken.append(coming.pop(0))
        if not taken:
            parts.append((begin, replace(inputs, pixels=None, images=0, extra={}), taken))
            continue
        first, last = taken[0].image, taken[-1].image
        extra = dict(inputs.extra)
        if extra.get("image_grid_thw") is not None:
            extra["image_grid_thw"] = extra["image_grid_thw"][first : last + 1]
        inputs = replace(inputs, images=last - first + 1, extra=extra)
        taken = [replace(view, image=view.image - first) for view in taken]
        parts.append((begin, inputs, host.assign_tiles(inputs, taken)))
    if coming:
        raise UserError(f"{len(coming)} of {len(views)} pictures have no placeholders in a prompt")
    return parts
