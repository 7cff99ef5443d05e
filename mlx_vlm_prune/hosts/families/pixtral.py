"""Pixtral: pictures of any shape in one row, each attending to itself only; no CLS.

A break stands after every row of placeholders. These are words, and all of them stay.

Shapes: S patches of all images, N of one, D features, H heads, d head size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..language_layers import split_heads
from ..prepared_inputs import PreparedInputs
from ..views import View
from .packed_patches import rotate
from .tower import TowerHost


class PixtralHost(TowerHost):
    why_no_decoder_methods = "words, its breaks, stand between the rows of an image"

    @property
    def encoder_layers(self) -> Sequence[Any]:
        """Layers up to the one whose output the features are."""
        layers = self.tower.transformer.layers
        return layers[: range(len(layers) + 1)[self.model.vision_feature_layer]]

    @property
    def token_side(self) -> int:
        side: int = self.tower.patch_size
        return side

    def encode_images(self, inputs: PreparedInputs, want: Mapping[str, int | None]) -> list[View]:
        pixels, patch = inputs.pixels, self.tower.patch_size
        if isinstance(pixels, list):
            pixels = mx.stack([mx.array(each) for each in pixels])
        pixels_IHW3 = (pixels[None] if pixels.ndim == 3 else pixels).transpose(0, 2, 3, 1)
        sizes = inputs.extra.get("image_sizes")
        *_, states = self.model.vision_tower(
            pixels_IHW3, output_hidden_states=True, image_sizes=sizes
        )
        if sizes is None:  # pictures fill the pixels
            sizes = [pixels_IHW3.shape[1:3]] * len(pixels_IHW3)
        views, begin = [], 0
        for i, (height, width) in enumerate(np.array(sizes).tolist()):
            grid = height // patch, width // patch
            end = begin + grid[0] * grid[1]
            parts = [x_1SD[:, begin:end] for x_1SD in states]
            views.append(View(i, self.signals(parts[self.depth], want, parts, grid=grid)))
            begin = end
        return views

    def queries_and_keys(
        self, layer: Any, x_ISD: mx.array, grid: tuple[int, int]
    ) -> tuple[mx.array, mx.array]:
        attention, x_ISD = layer.attention, layer.attention_norm(x_ISD)
        both = (
            split_heads(project(x_ISD), attention.num_heads)[0]
            for project in (attention.q_proj, attention.k_proj)
        )
        angles_Na = self._angles(grid)
        q, k = (rotate(y_HNd.swapaxes(0, 1), angles_Na).swapaxes(0, 1)[None] for y_HNd in both)
        return q, k

    def _angles(self, grid: tuple[int, int]) -> mx.array:
        """Angles of rotation of every patch (N, d / 2); the other half of d has the same."""
        across = self.tower.config.image_size // self.tower.patch_size
        at_N = (mx.arange(grid[0])[:, None] * across + mx.arange(grid[1])).flatten()
        angles_Nd = self.tower.patch_positional_embedding.inv_freq[at_N]
        return angles_Nd[:, : angles_Nd.shape[1] // 2]
