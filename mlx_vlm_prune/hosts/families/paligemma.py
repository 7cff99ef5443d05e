"""PaliGemma: one image by SigLIP, and one matrix.

Shapes: P patches, each a visual token, K kept, D features.
"""

from collections.abc import Mapping

import mlx.core as mx

from ...checkpoints.errors import UserError
from ..views import Inputs, View, per_picture
from .siglip import SiglipHost, encode


class PaliGemmaHost(SiglipHost):
    def see(self, inputs: Inputs, want: Mapping[str, int | None]) -> list[View]:
        if inputs.images > 1:
            raise UserError(
                "a paligemma model reads one image here: mlx-vlm shows it the first only"
            )
        assert inputs.pixels is not None
        pixels_1HW3 = self.as_read(inputs.pixels)
        x_PD, rest, states = self.model.vision_tower(pixels_1HW3, output_hidden_states=True)
        x_1PD = x_PD[None].astype(inputs.pixels.dtype)
        seen = encode(self.model.vision_tower.vision_model, (x_1PD, rest, states), want, 1)
        return per_picture(inputs, seen, pixels_1HW3)

    def project(self, x_1KD: mx.array) -> mx.array:
        return self.model.multi_modal_projector(x_1KD)
