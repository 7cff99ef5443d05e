"""LLaVA-NeXT: a small picture of the whole image, and crops at full size.

mlx-vlm puts a block of rows in place of each of the first placeholders and drops the others, so one
placeholder and one block say the same. Behind the crops it puts as many copies of the newline
embedding as there are patches; they tell nothing of the image, and are left out as soon as
anything is.

Shapes: K visual tokens kept of a crop, D features.
"""

from collections.abc import Sequence

import mlx.core as mx

from ...generation.tiles import Layout
from .llava import LlavaTowerHost


class LlavaNextHost(LlavaTowerHost):
    placeholder_unit = "all"
    whole_view = 0
    why_one_image = "mlx-vlm shows it the first only"

    def join_embeddings(self, x: Sequence[mx.array], is_full: bool) -> mx.array:
        """One block of all crops' embeddings, with the newlines only if nothing was pruned."""
        block = list(x)
        if is_full:
            patches = sum(map(len, block))
            block.append(mx.broadcast_to(self.model.image_newline, (patches, block[0].shape[-1])))
        return mx.concatenate(block)[None]

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


def best_resolution(size: tuple[int, int], pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) that keeps most pixels of an image of (width, height), and of several the
    smallest: transformers' `select_best_resolution`."""

    def lost_and_wasted(resolution: tuple[int, int]) -> tuple[int, int]:
        height, width = resolution
        scale = min(width / size[0], height / size[1])
        pixels = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return -pixels, width * height - pixels

    return min(pinpoints, key=lost_and_wasted)
