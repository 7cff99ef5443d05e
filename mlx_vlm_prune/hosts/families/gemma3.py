"""Gemma 3: SigLIP, of whose patches m x m make one visual token.

Shapes: I pictures, N visual tokens, K kept, D features, H x W patches.
"""

from collections.abc import Mapping

import mlx.core as mx

from ..views import Inputs, View, per_picture
from .siglip import SiglipHost, encode


class Gemma3Host(SiglipHost):
    def see(self, inputs: Inputs, want: Mapping[str, int | None]) -> list[View]:
        """The projector's mean over blocks comes first: it is what a visual token is made of."""
        assert inputs.pixels is not None
        pixels_IHW3 = self.as_read(inputs.pixels)
        out = self.model.vision_tower(pixels_IHW3, output_hidden_states=True)
        joint = self.model.multi_modal_projector
        seen = encode(self.model.vision_tower.vision_model, out, want, joint.kernel_size)
        side = joint.patches_per_image
        x_IHWD = joint.avg_pool(out[0].reshape(len(out[0]), side, side, -1))
        return per_picture(inputs, seen.replace(x_BND=x_IHWD.flatten(1, 2)), pixels_IHW3)

    def project(self, x_1KD: mx.array) -> mx.array:
        joint = self.model.multi_modal_projector
        y_1KD = joint.mm_soft_emb_norm(x_1KD) @ joint.mm_input_projection_weight
        return y_1KD.astype(x_1KD.dtype)
