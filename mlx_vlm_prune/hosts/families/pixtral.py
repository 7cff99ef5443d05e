"""Pixtral: pictures of any shape in one row, each attending to itself only; no CLS.

A break stands after every row of placeholders. These are words, and all of them stay.

Shapes: S patches of all images, N of one, K kept, D features, H heads, d head size.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from ...pruners.contract import Signals
from ...towers.between import Between
from ..host import Host
from ..layers import split
from ..views import Inputs, View
from .qwen import turned


class PixtralHost(Host):
    @property
    def depth(self) -> int:
        """Layers up to the one whose output the features are."""
        layers = self.model.vision_tower.vision_model.transformer.layers
        return range(len(layers) + 1)[self.model.vision_feature_layer]

    def see(self, inputs: Inputs, want: Mapping[str, int | None]) -> list[View]:
        assert inputs.pixels is not None
        pixels, tower, depth = inputs.pixels, self.model.vision_tower.vision_model, self.depth
        if isinstance(pixels, list):
            pixels = mx.stack([mx.array(each) for each in pixels])
        pixels_IHW3 = (pixels[None] if pixels.ndim == 3 else pixels).transpose(0, 2, 3, 1)
        sizes = inputs.extra.get("image_sizes")
        *_, states = self.model.vision_tower(
            pixels_IHW3, output_hidden_states=True, image_sizes=sizes
        )
        views, begin = [], 0
        for i, grid in enumerate(_grids(tower.patch_size, pixels_IHW3, sizes)):
            end = begin + grid[0] * grid[1]
            bare, angles_Na = Signals(states[depth][:, begin:end], grid), _angles(tower, grid)
            run = Between(bare, want, depth, (), has_cls=False)
            for at in sorted(set(run.want.values())):
                layer = tower.transformer.layers[at]
                run.read(at, *_queries_and_keys(layer, states[at][:, begin:end], angles_Na))
            views.append(View(i, run.signals))
            begin = end
        return views

    def project(self, x_1KD: mx.array) -> mx.array:
        return self.model.multi_modal_projector(x_1KD)


def _grids(patch: int, pixels_IHW3: mx.array, sizes: Any) -> list[tuple[int, int]]:
    """Rows and columns of each picture's patches; without `sizes` pictures fill the pixels."""
    if sizes is None:
        sizes = [pixels_IHW3.shape[1:3]] * len(pixels_IHW3)
    return [(int(h) // patch, int(w) // patch) for h, w in np.array(sizes)]


def _angles(tower: Any, grid: tuple[int, int]) -> mx.array:
    """Of the rotation at every patch of an image, half of them: the other half are the same."""
    across = tower.config.image_size // tower.patch_size
    at_N = (mx.arange(grid[0])[:, None] * across + mx.arange(grid[1])).flatten()
    angles_Nd = tower.patch_positional_embedding.inv_freq[at_N]
    return angles_Nd[:, : angles_Nd.shape[1] // 2]


def _queries_and_keys(
    layer: Any, x_1ND: mx.array, angles_Na: mx.array
) -> tuple[mx.array, mx.array]:
    """(1, H, N, d) each."""
    own, x_1ND = layer.attention, layer.attention_norm(x_1ND)
    both = (split(p(x_1ND), own.num_heads)[0] for p in (own.q_proj, own.k_proj))
    q, k = (turned(y_HNd.swapaxes(0, 1), angles_Na).swapaxes(0, 1)[None] for y_HNd in both)
    return q, k
