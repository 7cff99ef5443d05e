"""The embeddings of a prompt with fewer visual tokens, where mlx-vlm itself asks a model for them.

For a model class that stands in a checkpoint folder and leans on this package. Unlike a request of
ours, mlx-vlm tells ids and pixels only, so what else has to be known is read off these.

Shapes: L rows of the prompt, l left.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from ..pruners import plan
from ..pruners.budget import budget
from .families import common
from .mlx_vlm import family_of, see, shares, tell
from .refusals import check
from .views import Inputs, View

PLACED = ("position_ids", "rope_deltas", "deepstack_visual_embeds")  # would be derived anew


@dataclass(frozen=True)
class Pruning:
    """What is asked for: a method, and the budget of each image as a share or a number."""

    pruner: str
    keep_ratio: float | None
    keep_tokens: int | None
    global_image: int = 0  # Idefics3's: the token before the last tile of an image


def shortened(
    model: Any,
    whole: Callable[..., Any],
    asked: Pruning,
    input_ids: mx.array,
    pixels: Any,
    mask: mx.array | None,
    told: Mapping[str, Any],
) -> Any:
    """What the model's own `get_input_embeddings`, `whole`, makes of the rows that are left.

    Raises UserError, a ValueError, where the method or the budget cannot be.
    """
    if len(input_ids) != 1:
        raise ValueError(f"one prompt with images is read at a time, not {len(input_ids)}")
    inputs = _inputs(model, asked, input_ids, pixels, mask, told)
    pipeline = plan(asked.pruner)
    policy = check(model, family_of(model), pipeline, None)
    views = see(model, inputs, pipeline, _untimed)
    budgets: list[int] = []
    for sizes in _sizes(views):
        K = budget(sum(sizes), asked.keep_ratio, asked.keep_tokens, pipeline)
        budgets += shares(K, sizes)
    told_of = tell(model, inputs, views, pipeline, budgets, policy, _untimed).arguments
    place = {name: told_of.pop(name) for name in PLACED if name in told_of}
    short = whole(told_of.pop("input_ids"), told_of.pop("pixel_values"), **told_of)
    return replace(short, **place)


def _inputs(
    model: Any,
    asked: Pruning,
    input_ids: mx.array,
    pixels: Any,
    mask: mx.array | None,
    told: Mapping[str, Any],
) -> Inputs:
    ids = np.array(input_ids[0]).tolist()
    mask_1L = mx.ones((1, len(ids)), mx.int32) if mask is None else mask
    inputs = Inputs(ids, mask_1L, pixels, len(pixels), told)
    if asked.global_image:
        tiles = _tiles(ids, common.image_token(model, inputs), asked.global_image)
        inputs = replace(inputs, extra={**told, "num_patches_list": tiles})
    return inputs


def _tiles(ids: Sequence[int], placeholder: int, global_image: int) -> list[int]:
    """How many each image was cut into; before the last one's rows stands `global_image`."""
    tiles = [0]
    for before, token in pairwise([-1, *ids]):
        if token == placeholder and before != placeholder:
            tiles[-1] += 1
            tiles += [0] if before == global_image else []
    return [n for n in tiles if n]


def _sizes(views: Sequence[View]) -> list[list[int]]:
    """Each image's N, view after view."""
    sizes: list[list[int]] = []
    for image in range(1 + max(view.image for view in views)):
        sizes.append([v.signals.x_BND.shape[1] for v in views if v.image == image])
    return sizes


def _untimed(name: str, value: Any = None) -> Any:
    return value
