"""PaliGemma: images by SigLIP, one by one, and one matrix.

Shapes: P patches, each a visual token, D features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ...checkpoints.errors import UserError
from ..prepared_inputs import PreparedInputs, ProcessorOptions
from ..tower_cuts import TowerCuts
from ..views import View
from .cut_tower import CutTowerHost


class PaliGemmaHost(CutTowerHost):
    why_no_batches = "its prompts see their own end, and share a batch only when equally long"
    why_no_enhancer = "mlx-vlm gives its layers no mask, since its prompt sees its own end"
    why_no_decoder_methods = "its prompt sees its own end, so that no row comes last"

    def template_config(self, images: int) -> tuple[Any, int]:
        """mlx-vlm refuses a second image; `prepare` puts it before the first."""
        return self.model.config, min(images, 1)

    def prepare(
        self, text: str, images: Sequence[Image.Image], options: ProcessorOptions
    ) -> PreparedInputs:
        return super().prepare("<image>" * (len(images) - 1) + text, images, options)

    def encode_images(self, inputs: PreparedInputs, want: Mapping[str, int | None]) -> list[View]:
        self._check_places(inputs)
        views = []
        for i in range(len(inputs.pixels)):
            pixels_1HW3 = self.to_channels_last(inputs.pixels[i : i + 1])
            x_PD, _, states = self.model.vision_tower(pixels_1HW3, output_hidden_states=True)
            signals = self.signals(x_PD[None].astype(inputs.pixels.dtype), want, states)
            views.append(View(i, signals.of_image(0), pixels_1HW3[0]))
        return views

    def encode_with_cuts(
        self, inputs: PreparedInputs, want: Mapping[str, int | None], cuts: TowerCuts
    ) -> list[View]:
        self._check_places(inputs)
        return super().encode_with_cuts(inputs, want, cuts)

    def _check_places(self, inputs: PreparedInputs) -> None:
        """UserError if images stand elsewhere than at the beginning, where mlx-vlm puts them."""
        is_image = np.array(inputs.ids) == self.image_token_id(inputs)
        if inputs.images > 1 and not is_image[: is_image.sum()].all():
            raise UserError("the images of a paligemma prompt stand before its words")

    def tower_pixels(self, inputs: PreparedInputs) -> mx.array:
        return self.to_channels_last(inputs.pixels)

    def leave_tower(self, x_IKgD: mx.array) -> mx.array:
        return self.tower.post_layernorm(x_IKgD).flatten(2)
