"""LLaVA-NeXT: a small picture of the whole image, and crops at full size.

mlx-vlm puts a block of rows in place of each of the first placeholders and drops the others, so one
placeholder and one block say the same. Behind the crops it puts as many copies of the newline
embedding as there are patches; they tell nothing of the image, and are left out as soon as
anything is.

Shapes: K visual tokens kept of a crop, D features.
"""

from collections.abc import Sequence

import mlx.core as mx

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
