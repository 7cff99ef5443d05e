"""PaliGemma: one image by SigLIP, and one matrix.

Shapes: P patches, each a visual token, D features.
"""

from collections.abc import Mapping

from ..views import Inputs, View, per_picture
from .tower import TowerHost


class PaliGemmaHost(TowerHost):
    why_one_image = "mlx-vlm shows it the first only"

    def see(self, inputs: Inputs, want: Mapping[str, int | None]) -> list[View]:
        pixels_1HW3 = self.as_read(inputs.pixels)
        x_PD, _, states = self.model.vision_tower(pixels_1HW3, output_hidden_states=True)
        signals = self.signals(x_PD[None].astype(inputs.pixels.dtype), want, states)
        return per_picture(inputs, signals, pixels_1HW3)
