"""PaliGemma: one image by SigLIP, and one matrix.

Shapes: P patches, each a visual token, D features.
"""

from collections.abc import Mapping

from ..prepared_inputs import PreparedInputs
from ..views import View, make_views
from .tower import TowerHost


class PaliGemmaHost(TowerHost):
    why_no_enhancer = "mlx-vlm gives its layers no mask, since its prompt sees its own end"
    why_one_image = "mlx-vlm shows it the first only"

    def encode_images(self, inputs: PreparedInputs, want: Mapping[str, int | None]) -> list[View]:
        pixels_1HW3 = self.to_channels_last(inputs.pixels)
        x_PD, _, states = self.model.vision_tower(pixels_1HW3, output_hidden_states=True)
        signals = self.signals(x_PD[None].astype(inputs.pixels.dtype), want, states)
        return make_views(inputs, signals, pixels_1HW3)
