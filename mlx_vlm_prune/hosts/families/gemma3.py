"""Gemma 3: SigLIP, of whose patches m x m make one visual token.

Shapes: I pictures, P patches, K visual tokens kept, D features.
"""

from collections.abc import Mapping, Sequence

import mlx.core as mx

from ..language_layers import Gemma3Layers
from ..prepared_inputs import PreparedInputs
from ..views import View, make_views
from .cut_tower import CutTowerHost


class Gemma3Host(CutTowerHost):
    language_layers_class = Gemma3Layers
    limits = "between the language model's layers prompts must be shorter than its window"

    @property
    def mask_layers(self) -> Sequence[int]:
        """The first with a window of attention, and the first without."""
        return sorted({0, self.language.model.sliding_window_pattern - 1})

    def encode_images(self, inputs: PreparedInputs, want: Mapping[str, int | None]) -> list[View]:
        """A visual token is the mean of m x m patches; the projector's pooling makes it."""
        pixels_IHW3 = self.tower_pixels(inputs)
        x_IPD, _, states = self.model.vision_tower(pixels_IHW3, output_hidden_states=True)
        projector = self.model.multi_modal_projector
        side = projector.patches_per_image
        x_IHWD = projector.avg_pool(x_IPD.reshape(len(x_IPD), side, side, -1))
        signals = self.signals(x_IHWD.flatten(1, 2), want, states, m=projector.kernel_size)
        return make_views(inputs, signals, pixels_IHW3)

    def tower_pixels(self, inputs: PreparedInputs) -> mx.array:
        return self.to_channels_last(inputs.pixels)

    @property
    def token_patches(self) -> int:
        m: int = self.model.multi_modal_projector.kernel_size
        return m

    def leave_tower(self, x_IKgD: mx.array) -> mx.array:
        return self.tower.post_layernorm(x_IKgD).mean(axis=2)

    def project(self, x_1KD: mx.array) -> mx.array:
        projector = self.model.multi_modal_projector
        y_1KD = projector.mm_soft_emb_norm(x_1KD) @ projector.mm_input_projection_weight
        return y_1KD.astype(x_1KD.dtype)
