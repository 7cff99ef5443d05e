"""FastVLM: FastViTHD, whose last stage attends; no CLS, and one placeholder for the image.

Shapes: I pictures, N = H * W cells of the last stage, K kept, D features, C channels, h heads,
d head size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from ...inputs.placement import Affine, Size
from ...inputs.preprocessor import Preprocessor
from ..prepared_inputs import PreparedInputs
from ..views import View, make_views
from .tower import TowerHost


class FastVLMHost(TowerHost):
    placeholder_unit = "image"
    why_one_image = "mlx-vlm puts the words between several images in the wrong places"

    @property
    def encoder_layers(self) -> Sequence[Any]:
        """Blocks of the last stage; none where they have no attention."""
        stage = self.tower.network[-1]
        return stage if hasattr(stage[0].token_mixer, "qkv") else []

    def encode_images(self, inputs: PreparedInputs, want: Mapping[str, int | None]) -> list[View]:
        tower, states = self.tower, []
        dtype = tower.patch_embed.blocks[0].reparam_conv.weight.dtype
        pixels_IHW3 = inputs.pixels.astype(dtype).transpose(0, 2, 3, 1)
        x_IHWC = tower.patch_embed(pixels_IHW3)
        for part in tower.network[:-1]:
            x_IHWC = part(x_IHWC)
        images, (H, W) = len(x_IHWC), x_IHWC.shape[1:3]
        for block in tower.network[-1]:
            states.append(x_IHWC)
            x_IHWC = block(x_IHWC)
        x_IND = tower.conv_exp(x_IHWC).reshape(images, H * W, -1)
        return make_views(inputs, self.signals(x_IND, want, states, grid=(H, W)), pixels_IHW3)

    def to_image(self, view: View, size: Size, kwargs: Mapping[str, Any]) -> tuple[Size, Affine]:
        """It is made square first."""
        settings = {**vars(self.processor.image_processor), **kwargs}
        side = settings["size"].get("shortest_edge") or settings["size"]["height"]
        crop = settings["crop_size"].get("height"), settings["crop_size"].get("width")
        is_cut = settings["do_center_crop"] and None not in crop
        return Preprocessor((side, side), crop if is_cut else None, pad=True).to_image(size)

    def queries_and_keys(
        self, layer: Any, x_ISD: mx.array, grid: tuple[int, int]
    ) -> tuple[mx.array, mx.array]:
        mixer = layer.token_mixer
        qkv = mixer.qkv(layer.norm(x_ISD).flatten(1, 2))
        qkv = qkv.reshape(*qkv.shape[:2], 3, mixer.num_heads, mixer.head_dim)
        q_IhNd, k_IhNd, _ = qkv.transpose(2, 0, 3, 1, 4)
        return q_IhNd, k_IhNd

    def project(self, x_1KD: mx.array) -> mx.array:
        return self.model.mm_projector(x_1KD)

    def join_embeddings(self, x: Sequence[mx.array], is_full: bool) -> list[mx.array]:
        """Each picture's embeddings (K, D), which take the place of its one placeholder."""
        return list(x)
