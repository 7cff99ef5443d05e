"""LLaVA-NeXT: a small picture of the whole image, and crops at full size.

mlx-vlm puts a block of rows in place of each of the first placeholders and drops the others, so one
placeholder and one block say the same. Behind the crops it puts as many copies of the newline
embedding as there are patches; they tell nothing of the image, and are left out as soon as
anything is.

mlx-vlm shows a model the first image only. Here blocks are as long as divides the rows of every
image, so that each image has its own, in the place of its placeholders; without newlines.

Shapes: I images, C crops of one with padding, T crops of all, K visual tokens kept of a crop,
D features, b rows of a block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import gcd
from typing import Any

import mlx.core as mx
import numpy as np

from ...checkpoints.errors import UserError
from ...generation.tiles import Layout
from ...pruners.contract import Reduction
from ..prepared_inputs import PreparedInputs
from ..tower_cuts import TowerCuts
from ..views import View
from .llava import LlavaTowerHost


class LlavaNextHost(LlavaTowerHost):
    has_tiles = True
    placeholder_unit = "all"
    why_no_batches = "mlx-vlm puts an image's rows in place of one id, so its rows grow by images"
    why_no_decoder_methods = "mlx-vlm puts the images' rows in place of one id, which names none"
    whole_view = 0

    def template_config(self, images: int) -> tuple[Any, int]:
        """mlx-vlm refuses a second image of this family only; LLaVA's turns are the same."""
        return {"model_type": "llava"} if images > 1 else self.model.config, images

    def encode_images(self, inputs: PreparedInputs, want: Mapping[str, int | None]) -> list[View]:
        return super().encode_images(_with_crops_in_a_row(inputs), want)

    def encode_with_cuts(
        self, inputs: PreparedInputs, want: Mapping[str, int | None], cuts: TowerCuts
    ) -> list[View]:
        return super().encode_with_cuts(_with_crops_in_a_row(inputs), want, cuts)

    def image_embeddings(
        self, views: Sequence[View], x: Sequence[mx.array], is_full: bool
    ) -> mx.array:
        rows = rows_by_image(views, list(map(len, x)))
        if len(rows) == 1:
            return self.join_embeddings(x, is_full)
        x_UD = mx.concatenate(list(x))
        return x_UD.reshape(-1, gcd(*rows), x_UD.shape[-1])

    def placeholders_of_blocks(
        self, placeholders: np.ndarray, views: Sequence[View], reductions: Sequence[Reduction]
    ) -> np.ndarray:
        rows = rows_by_image(views, [reduction.slots for reduction in reductions])
        if len(rows) == 1:
            return placeholders[:1]
        blocks = [n // gcd(*rows) for n in rows]
        runs = np.split(placeholders, np.flatnonzero(np.diff(placeholders) > 1) + 1)
        if len(runs) == 1:  # no word stands between images
            runs, blocks = [placeholders], [sum(blocks)]
        if len(runs) != len(blocks):
            raise UserError(
                f"the prompt has placeholders in {len(runs)} places for {len(rows)} images; words"
                " must stand between all images, or none"
            )
        return np.concatenate([run[:n] for run, n in zip(runs, blocks, strict=True)])

    def join_embeddings(self, x: Sequence[mx.array], is_full: bool) -> mx.array:
        """One block of all crops' embeddings, with the newlines only if nothing was pruned."""
        block = list(x)
        if is_full:
            patches = sum(map(len, block))
            block.append(mx.broadcast_to(self.model.image_newline, (patches, block[0].shape[-1])))
        return mx.concatenate(block)[None]

    def full_rows(self, tokens: int, images: int) -> int:
        """Of one image with as many newlines."""
        return 2 * tokens if images == 1 else tokens

    def layout(self, views: int, size: tuple[int, int]) -> Layout | None:
        """The whole image, then the crops of the resolution that its processor takes for it."""
        if views == 1:
            return Layout(1, 1)
        pinpoints = getattr(self.processor.image_processor, "image_grid_pinpoints", None)
        if not pinpoints:
            return None
        height, width = best_resolution(size, pinpoints)
        side = self.model.config.vision_config.image_size
        return Layout(height // side, width // side, overview=0)


def _with_crops_in_a_row(inputs: PreparedInputs) -> PreparedInputs:
    """Those of several images, without padding, and how many each has."""
    pixels_IC3HW = inputs.pixels
    if inputs.images < 2 or pixels_IC3HW.ndim != 5:
        return inputs
    is_crop_IC = np.array((pixels_IC3HW != 0).any(axis=(2, 3, 4)))  # zeros fill up the fewer
    pixels_T3HW = pixels_IC3HW.flatten(0, 1)[mx.array(np.flatnonzero(is_crop_IC))]
    extra = {**inputs.extra, "num_patches_list": is_crop_IC.sum(axis=1).tolist()}
    return replace(inputs, pixels=pixels_T3HW, extra=extra)


def rows_by_image(views: Sequence[View], rows: Sequence[int]) -> list[int]:
    """The rows of each image, by those of its views."""
    by_image = [0] * (1 + max(view.image for view in views))
    for view, n in zip(views, rows, strict=True):
        by_image[view.image] += n
    return by_image


def best_resolution(size: tuple[int, int], pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) that keeps most pixels of an image of (width, height), and of several the
    smallest: transformers' `select_best_resolution`."""

    def lost_and_wasted(resolution: tuple[int, int]) -> tuple[int, int]:
        height, width = resolution
        scale = min(width / size[0], height / size[1])
        pixels = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return -pixels, width * height - pixels

    return min(pinpoints, key=lost_and_wasted)
