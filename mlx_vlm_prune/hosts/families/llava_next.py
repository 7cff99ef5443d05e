"""LLaVA-NeXT: a small picture of the whole image, and crops at full size.

mlx-vlm puts a block of rows in place of each of the first placeholders and drops the others, so one
placeholder and one block say the same. Behind the crops it puts as many copies of the newline
embedding as there are patches; they tell nothing of the image, and are left out as soon as
anything is.

Shapes: C crops, N patches of a crop, K kept, D features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from ...checkpoints.errors import UserError
from ..views import Inputs, View, per_picture
from .llava import LlavaTowerHost


class LlavaNextHost(LlavaTowerHost):
    placeholders = "all"

    def see(self, inputs: Inputs, want: Mapping[str, int | None]) -> list[View]:
        if inputs.images > 1:
            raise UserError(
                "a llava_next model reads one image here: mlx-vlm shows it the first only"
            )
        assert inputs.pixels is not None
        return per_picture(inputs, *self.encode(inputs.pixels[0], want))

    def hand_over(
        self, x: Sequence[mx.array], deep: Sequence[Sequence[mx.array]], is_full: bool
    ) -> dict[str, Any]:
        """One block of all crops' embeddings."""
        rows = list(x)
        if is_full:
            patches = sum(map(len, rows))
            rows.append(mx.broadcast_to(self.model.image_newline, (patches, rows[0].shape[-1])))
        return {"cached_image_features": mx.concatenate(rows)[None]}
