"""A batch as mlx-vlm's tools hand it over, taken apart into prompts with their own images.

Shapes: B prompts, L rows of the longest, N visual tokens of a view, T pictures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from .families import Family
from .views import Inputs, View, tiles

# Families that cut an image into tiles, and whose prompts reach us without how many.
TILED = ("idefics3", "smolvlm", "internvl_chat")
GLOBAL_IMAGE = "global_image_token_id"  # what a pruned folder's file adds to the configuration
Look = Callable[[Inputs], list[View]]


def taken_apart(
    model: Any,
    family: Family,
    ids_BL: mx.array,
    mask_BL: mx.array | None,
    pixels: Any,
    extra: Mapping[str, Any],
    look: Look,
) -> list[tuple[int, Inputs, list[View]]]:
    """Of each prompt where it begins in its padded row, what it says, and what the tower saw.

    Raises UserError where the images do not fit the prompts.
    """
    real_BL = np.ones(ids_BL.shape, bool) if mask_BL is None else np.array(mask_BL) != 0
    prompts = [
        (int(real_L.argmax()), _inputs(np.array(ids_L)[real_L].tolist(), pixels, extra))
        for ids_L, real_L in zip(ids_BL, real_BL, strict=True)
    ]
    if len(prompts) == 1:
        begin, inputs = prompts[0]
        return [(begin, inputs, _grouped(model, family, inputs, look(inputs)))]
    if family.placeholders != "token":
        kind = model.config.model_type
        raise UserError(f"a {kind} model reads one prompt at a time here: its rows grow by images")
    if not isinstance(pixels, list) and pixels.ndim == 5:  # each prompt's tiles in a row of its own
        return [
            (begin, own, _grouped(model, family, own, look(own) if own.pixels is not None else []))
            for begin, own in (
                (begin, _tiles_of(model, family, inputs, b))
                for b, (begin, inputs) in enumerate(prompts)
            )
        ]
    return _dealt(model, family, prompts, look(prompts[0][1]))


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


def _tiles_of(model: Any, family: Family, inputs: Inputs, b: int) -> Inputs:
    if family.image_token(model, inputs) not in inputs.ids:
        return replace(inputs, pixels=None, images=0)
    own = dict(inputs.extra)
    if own.get("pixel_attention_mask") is not None:
        own["pixel_attention_mask"] = own["pixel_attention_mask"][b : b + 1]
    assert inputs.pixels is not None
    return replace(inputs, pixels=inputs.pixels[b : b + 1], images=1, extra=own)


def _dealt(
    model: Any, family: Family, prompts: Sequence[tuple[int, Inputs]], views: Sequence[View]
) -> list[tuple[int, Inputs, list[View]]]:
    """Each prompt's own views, as many as it has placeholders for."""
    coming, done = list(views), []
    for begin, inputs in prompts:
        room, own = inputs.ids.count(family.image_token(model, inputs)), list[View]()
        while coming and sum(v.signals.x_BND.shape[1] for v in own) < room:
            own.append(coming.pop(0))
        if not own:
            done.append((begin, replace(inputs, pixels=None, images=0, extra={}), own))
            continue
        first, last = own[0].image, own[-1].image
        extra = dict(inputs.extra)
        if extra.get("image_grid_thw") is not None:
            extra["image_grid_thw"] = extra["image_grid_thw"][first : last + 1]
        mine = replace(inputs, images=last - first + 1, extra=extra)
        own = [replace(view, image=view.image - first) for view in own]
        done.append((begin, mine, _grouped(model, family, mine, own)))
    if coming:
        raise UserError(f"{len(coming)} of {len(views)} pictures have no placeholders in a prompt")
    return done


def _grouped(model: Any, family: Family, inputs: Inputs, views: list[View]) -> list[View]:
    """Tiles by images: InternVL's stand in one run; Idefics3's are of one image where no token
    tells them apart.

    Elsewhere a view's image is known already.
    """
    kind = model.config.model_type
    if kind not in TILED or "num_patches_list" in inputs.extra or not views:
        return views
    placeholder, N = family.image_token(model, inputs), views[0].signals.x_BND.shape[1]
    if kind == "internvl_chat":
        runs = [len(list(run)) for token, run in groupby(inputs.ids) if token == placeholder]
        counts = [length // N for length in runs]
    elif (whole := _global_image(model)) is not None:
        counts = tiles(inputs.ids, placeholder, whole)
    else:
        counts = [len(views)]
    whose = [image for image, n in enumerate(counts) for _ in range(n)]
    if len(whose) != len(views):
        raise UserError(f"the prompt has room for {len(whose)} tiles and the images have"
                        f" {len(views)}")  # fmt: skip
    return [replace(view, image=image) for view, image in zip(views, whose, strict=True)]


def _global_image(model: Any) -> int | None:
    """The token before the tile that shows a whole image, where a pruned folder's model knows it:
    no configuration of mlx-vlm's has it."""
    return getattr(model.config, GLOBAL_IMAGE, None)


def tiles_are_untold(model: Any, inputs: Inputs, views: Sequence[View]) -> bool:
    """Are there several tiles, and nothing that says which are of one image?"""
    is_marked = _global_image(model) is not None or "num_patches_list" in inputs.extra
    return model.config.model_type in TILED[:2] and not is_marked and len(views) > 1
