"""LLaVA-NeXT: a small picture of the whole image, and crops at full size.

mlx-vlm puts a block of rows in place of each of the first placeholders and drops the others, so one
placeholder and one block say the same. Behind the crops it puts as many copies of the newline
embedding as there are patches; they tell nothing of the image, and are left out as soon as
anything is.

Shapes: K visual tokens kept of a crop, D features.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .llava import LlavaTowerHost


class LlavaNextHost(LlavaTowerHost):
    placeholder_unit = "all"
    why_one_image = "mlx-vlm shows it the first only"

    def join_embeddings(self, x: Sequence[mx.array], is_full: bool) -> dict[str, Any]:
        """One block of all crops' embeddings."""
        rows = list(x)
        if is_full:
            patches = sum(map(len, rows))
            rows.append(mx.broadcast_to(self.model.image_newline, (patches, rows[0].shape[-1])))
        return {"cached_image_features": mx.concatenate(rows)[None]}
