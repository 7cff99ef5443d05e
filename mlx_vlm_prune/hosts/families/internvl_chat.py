"""InternVL: InternViT over tiles, with CLS; 2 x 2 patches make one visual token.

Shapes: T tiles, S tokens with CLS, N visual tokens, K kept, D features, H heads, d head size.
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import mlx.core as mx

from ...projector import merged
from ..host import Host
from ..layers import split
from ..views import Inputs, View, by_image, per_picture
from .common import signals


class InternVLHost(Host):
    @property
    def depth(self) -> int:
        return len(self.model.vision_model.encoder.layers)

    def see(self, inputs: Inputs, want: Mapping[str, int | None]) -> list[View]:
        from mlx_vlm.models.base import pixel_shuffle

        assert inputs.pixels is not None
        tower, pixels, ratio = self.model.vision_model, inputs.pixels, self.model.downsample_ratio
        pixels = pixels.astype(tower.embeddings.patch_embedding.weight.dtype)
        pixels_THW3 = (pixels[0] if pixels.ndim == 5 else pixels).transpose(0, 2, 3, 1)
        x_TSD, _, after = tower(pixels_THW3, output_hidden_states=True)
        states = [tower.embeddings(pixels_THW3) if 0 in want.values() else None, *after]
        side, m = int((x_TSD.shape[1] - 1) ** 0.5), int(1 / ratio)
        layers = tower.encoder.layers
        seen = signals(x_TSD[:, 1:], (side, side), want, layers, states, True, _queries_and_keys)
        x_TND = pixel_shuffle(x_TSD[:, 1:], shuffle_ratio=ratio)
        return per_picture(inputs, merged(seen, (m, m)).replace(x_BND=x_TND), pixels_THW3)

    def project(self, x_1KD: mx.array) -> mx.array:
        for layer in self.model.mlp1:
            x_1KD = layer(x_1KD)
        return x_1KD

    def assign_tiles(self, inputs: Inputs, views: list[View]) -> list[View]:
        """An image's tiles stand in one run of placeholders."""
        if "num_patches_list" in inputs.extra or not views:
            return views
        placeholder, N = self.image_token_id(inputs), views[0].signals.x_BND.shape[1]
        runs = [len(list(run)) for token, run in groupby(inputs.ids) if token == placeholder]
        return by_image(views, [length // N for length in runs])


def _queries_and_keys(layer: Any, x_TSD: mx.array) -> tuple[mx.array, mx.array]:
    """(T, H, S, d) each."""
    own = layer.attn
    q_TSD, k_TSD, _ = mx.split(own.qkv(layer.norm1(x_TSD)), 3, axis=-1)
    if own.qk_normalization:
        q_TSD, k_TSD = own.q_norm(q_TSD), own.k_norm(k_TSD)
    return split(q_TSD, own.num_heads), split(k_TSD, own.num_heads)
