"""PaliGemma: images by SigLIP, one by one, and one matrix.

Shapes: P patches, each a visual token, D features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ...checkpoints.errors import UserError
from ..prepared_inputs import PreparedInputs, ProcessorOptions
from ..views import View
from .tower import TowerHost


class PaliGemmaHost(TowerHost):
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
        """mlx-vlm puts all rows of images at the beginning, so there they must stand."""
        is_image = np.array(inputs.ids) == self.image_token_id(inputs)
        if inputs.images > 1 and not is_image[: is_image.sum()].all():
            raise UserError("the images of a paligemma prompt stand before its words")
        views = []
        for i in range(len(inputs.pixels)):
            pixels_1HW3 = self.to_channels_last(inputs.pixels[i : i + 1])
            x_PD, _, states = self.model.vision_tower(pixels_1HW3, output_hidden_states=True)
            signals = self.signals(x_PD[None].astype(inputs.pixels.dtype), want, states)
            views.append(View(i, signals.of_image(0), pixels_1HW3[0]))
        return views
