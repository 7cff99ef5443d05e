"""InternVL: InternViT over tiles, with CLS; 2 x 2 patches make one visual token.

Shapes: T tiles, S tokens with CLS, N visual tokens, K kept, D features, H heads, d head size.
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import mlx.core as mx

from ...generation.tiles import Layout, nearest_layout
from ..language_layers import RopeOffsetLayers, split_heads
from ..prepared_inputs import PreparedInputs
from ..views import View, assign_images, make_views
from .tower import TowerHost


class InternVLHost(TowerHost):
    language_layers_class = RopeOffsetLayers
    has_tiles = True

    @property
    def tower(self) -> Any:
        return self.model.vision_model

    def encode_images(self, inputs: PreparedInputs, want: Mapping[str, int | None]) -> list[View]:
        from mlx_vlm.models.base import pixel_shuffle

        tower, pixels, ratio = self.tower, inputs.pixels, self.model.downsample_ratio
        pixels = pixels.astype(tower.embeddings.patch_embedding.weight.dtype)
        pixels_THW3 = (pixels[0] if pixels.ndim == 5 else pixels).transpose(0, 2, 3, 1)
        x_TSD, _, after = tower(pixels_THW3, output_hidden_states=True)
        states = [tower.embeddings(pixels_THW3) if 0 in want.values() else None, *after]
        x_TND = pixel_shuffle(x_TSD[:, 1:], shuffle_ratio=ratio)
        signals = self.signals(x_TND, want, states, m=int(1 / ratio), has_cls=True)
        return make_views(inputs, signals, pixels_THW3)

    def queries_and_keys(
        self, layer: Any, x_ISD: mx.array, grid: tuple[int, int]
    ) -> tuple[mx.array, mx.array]:
        attention = layer.attn
        q_ISD, k_ISD, _ = mx.split(attention.qkv(layer.norm1(x_ISD)), 3, axis=-1)
        if attention.qk_normalization:
            q_ISD, k_ISD = attention.q_norm(q_ISD), attention.k_norm(k_ISD)
        return split_heads(q_ISD, attention.num_heads), split_heads(k_ISD, attention.num_heads)

    def project(self, x_1KD: mx.array) -> mx.array:
        for layer in self.model.mlp1:
            x_1KD = layer(x_1KD)
        return x_1KD

    def layout(self, views: int, size: tuple[int, int]) -> Layout:
        processor = getattr(self.processor, "image_processor", None)
        has_overview = getattr(processor, "dynamic_use_thumbnail", True)
        return nearest_layout(views, size, has_overview=has_overview)

    def assign_tiles(self, inputs: PreparedInputs, views: list[View]) -> list[View]:
        """The tiles of an image are one run of placeholders."""
        placeholder, N = self.image_token_id(inputs), views[0].signals.x_BND.shape[1]
        runs = [len(list(run)) for token, run in groupby(inputs.ids) if token == placeholder]
        return assign_images(views, [length // N for length in runs])
