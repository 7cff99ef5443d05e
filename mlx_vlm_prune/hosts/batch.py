"""A padded batch, as mlx-vlm's tools hand it over, split into prompts with their own images.

Shapes: B prompts, L rows of the longest, N visual tokens of a view.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from .host import Host
from .prepared_inputs import PreparedInputs
from .views import View


@dataclass(frozen=True)
class BatchPrompt:
    """One prompt of a batch; without views where it has no image."""

    columns: range  # where it stands; the other columns are padding
    inputs: PreparedInputs
    views: list[View]


def split_batch(
    host: Host,
    ids_BL: mx.array,
    mask_BL: mx.array | None,
    pixels: Any,
    extra: Mapping[str, Any],
    encode: Callable[[PreparedInputs], list[View]],
) -> list[BatchPrompt]:
    """The prompts of a batch, with their views by `encode`.

    Raises UserError where the images do not fit the prompts.
    """
    is_real_BL = np.ones(ids_BL.shape, bool) if mask_BL is None else np.array(mask_BL) != 0
    images, prompts = _count_images(pixels, extra), []
    for ids_L, is_real_L in zip(np.array(ids_BL), is_real_BL, strict=True):
        ids = ids_L[is_real_L].tolist()
        mask_1L = mx.ones((1, len(ids)), mx.int32)
        prompts.append(PreparedInputs(ids, mask_1L, pixels, images, extra))
    if len(prompts) == 1:
        pairs = [(prompts[0], encode(prompts[0]))]
    elif host.placeholder_unit != "token":
        raise UserError(
            f"a {host.kind} model reads one prompt at a time here: {host.why_no_batches}"
        )
    elif isinstance(pixels, list) or pixels.ndim != 5 or host.has_image_rows:
        pairs = _deal_views(host, prompts, encode(prompts[0]))
    else:  # row b of the pixels has the tiles of prompt b
        tiled = [_with_pixel_row(host, inputs, b) for b, inputs in enumerate(prompts)]
        pairs = [(inputs, encode(inputs) if inputs.images else []) for inputs in tiled]
    batch = []
    for is_real_L, (inputs, views) in zip(is_real_BL, pairs, strict=True):
        if views and "num_patches_list" not in inputs.extra:
            views = host.assign_tiles(inputs, views)
        begin = int(is_real_L.argmax())
        batch.append(BatchPrompt(range(begin, begin + len(inputs.ids)), inputs, views))
    return batch


def _count_images(pixels: Any, extra: Mapping[str, Any]) -> int:
    """The number of images as far as the arrays tell, a clip aside. Tiles count as one image."""
    for name in ("image_grid_thw", "num_patches_list", "image_sizes"):
        if extra.get(name) is not None:
            return len(extra[name])
    if extra.get("video_grid_thw") is not None:
        return 0
    if isinstance(pixels, list):
        return len(pixels)
    return 1 if pixels.ndim in (3, 5) else len(pixels)


def _with_pixel_row(host: Host, inputs: PreparedInputs, b: int) -> PreparedInputs:
    """The inputs with row b of the pixels; without pixels where the prompt has no image."""
    if host.image_token_id(inputs) not in inputs.ids:
        return replace(inputs, pixels=None, images=0)
    extra = dict(inputs.extra)
    if extra.get("pixel_attention_mask") is not None:
        extra["pixel_attention_mask"] = extra["pixel_attention_mask"][b : b + 1]
    return replace(inputs, pixels=inputs.pixels[b : b + 1], images=1, extra=extra)


def _deal_views(
    host: Host, prompts: Sequence[PreparedInputs], views: Sequence[View]
) -> list[tuple[PreparedInputs, list[View]]]:
    """Each prompt, in their order, with as many views as it has placeholders for."""
    waiting, pairs = list(views), []
    for inputs in prompts:
        room, dealt = inputs.ids.count(host.image_token_id(inputs)), list[View]()
        while waiting and sum(len(view.is_token) for view in dealt) < room:
            dealt.append(waiting.pop(0))
        if not dealt:
            pairs.append((replace(inputs, pixels=None, images=0, extra={}), dealt))
            continue
        first, last = dealt[0].image, dealt[-1].image
        extra = dict(inputs.extra)
        if extra.get("image_grid_thw") is not None:
            extra["image_grid_thw"] = extra["image_grid_thw"][first : last + 1]
        inputs = replace(inputs, images=last - first + 1, extra=extra)
        pairs.append((inputs, [replace(view, image=view.image - first) for view in dealt]))
    if waiting:
        raise UserError(f"{len(waiting)} of {len(views)} pictures have no placeholders in a prompt")
    return pairs
