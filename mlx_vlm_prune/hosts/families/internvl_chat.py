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
from .cut_tower import CutTowerHost


class InternVLHost(CutTowerHost):
    language_layers_class = RopeOffsetLayers
    has_tiles = True

    @property
    def tower(self) -> Any:
        return self.model.vision_model

    def encode_images(self, inputs: PreparedInputs, want: Mapping[str, int | None]) -> list[View]:
        from mlx_vlm.models.base import pixel_shuffle

        tower, pixels_THW3, ratio = (
            self.tower,
            self.tower_pixels(inputs),
            self.model.downsample_ratio,
        )
        x_TSD, _, after = tower(pixels_THW3, output_hidden_states=True)
        states = [tower.embeddings(pixels_THW3) if 0 in want.values() else None, *after]
        x_TND = pixel_shuffle(x_TSD[:, 1:], shuffle_ratio=ratio)
        signals = self.signals(x_TND, want, states, m=self.token_patches, has_cls=True)
        return make_views(inputs, signals, pixels_THW3)

    def queries_and_keys(
        self, layer: Any, x_ISD: mx.array, grid: tuple[int, int]
    ) -> tuple[mx.array, mx.array]:
        q_IHSd, k_IHSd, _ = self.heads(layer, x_ISD)
        return q_IHSd, k_IHSd

    def heads(self, layer: Any, x_ISD: mx.array) -> list[mx.array]:
        attention = layer.attn
        q_ISD, k_ISD, v_ISD = mx.split(attention.qkv(layer.norm1(x_ISD)), 3, axis=-1)
        if attention.qk_normalization:
            q_ISD, k_ISD = attention.q_norm(q_ISD), attention.k_norm(k_ISD)
        return [split_heads(each, attention.num_heads) for each in (q_ISD, k_ISD, v_ISD)]

    def project_attended(self, layer: Any, y_ISD: mx.array) -> mx.array:
        return (layer.attn.proj(y_ISD) * layer.ls1).astype(y_ISD.dtype)

    def feed_forward(self, layer: Any, x_ISD: mx.array) -> mx.array:
        return (layer.mlp(layer.norm2(x_ISD)) * layer.ls2).astype(x_ISD.dtype)

    def tower_pixels(self, inputs: PreparedInputs) -> mx.array:
        pixels = inputs.pixels.astype(self.tower.embeddings.patch_embedding.weight.dtype)
        return (pixels[0] if pixels.ndim == 5 else pixels).transpose(0, 2, 3, 1)

    @property
    def tower_has_cls(self) -> bool:
        return True

    @property
    def token_patches(self) -> int:
        return int(1 / self.model.downsample_ratio)

    def leave_tower(self, x_IKgD: mx.array) -> mx.array:
        from mlx_vlm.models.base import pixel_shuffle

        images, K = x_IKgD.shape[:2]
        x = pixel_shuffle(x_IKgD.flatten(0, 1), shuffle_ratio=self.model.downsample_ratio)
        return x.reshape(images, K, -1)

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
        placeholder, N = self.image_token_id(inputs), views[0].N
        runs = [len(list(run)) for token, run in groupby(inputs.ids) if token == placeholder]
        return assign_images(views, [length // N for length in runs])
