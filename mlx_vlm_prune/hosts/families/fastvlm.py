"""FastVLM: FastViTHD, whose last stage attends; no CLS, and one placeholder for an image.

Shapes: I pictures, N = H * W cells of the last stage, K kept, D features, C channels, h heads,
d head size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ...checkpoints.errors import UserError
from ...inputs.placement import Affine, Size
from ...inputs.preprocessor import Preprocessor
from ..prepared_inputs import PreparedInputs
from ..views import View, make_views
from .tower import TowerHost


class FastVLMHost(TowerHost):
    placeholder_unit = "image"
    why_no_encoder_methods = (
        "it works between the tower's layers, most of which are convolutions here and need the"
        " whole grid"
    )
    why_no_batches = "mlx-vlm puts an image's rows in place of one id, so its rows grow by images"
    why_no_decoder_methods = "mlx-vlm puts an image's rows in place of one id, which names none"

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

    def arrange_ids(self, ids_1L: mx.array) -> mx.array:
        """The placeholder of image i, counted from 0, i places ahead of its own.

        mlx-vlm 0.7 cuts the words, without placeholders, where these stand among all ids: i words
        too late at image i. Raises UserError where no word stands between two images.
        """
        ids = np.array(ids_1L)[0]
        is_image = ids == self.model.config.image_token_index
        places = np.flatnonzero(is_image) - np.arange(is_image.sum())
        if len(places) < 2:
            return ids_1L
        if (np.diff(places) < 1).any():
            raise UserError("a fastvlm prompt needs a word between two images")
        arranged = np.full(len(ids), self.model.config.image_token_index)
        arranged[np.delete(np.arange(len(ids)), places)] = ids[~is_image]
        return mx.array(arranged.astype(np.int32))[None]

    def project(self, x_1KD: mx.array) -> mx.array:
        return self.model.mm_projector(x_1KD)

    def join_embeddings(self, x: Sequence[mx.array], is_full: bool) -> list[mx.array]:
        """Each picture's embeddings (K, D), which take the place of its one placeholder."""
        return list(x)
