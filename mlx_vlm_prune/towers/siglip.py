"""SigLIP's vision transformer (arXiv:2303.15343, arXiv:2502.14786), as MiniMind-3V reads it.

Attribute names equal Hugging Face's, so weights need no renaming. There is no CLS token; the
features are the last layer's after `post_layernorm`, and the pooling head is left out.

Shapes: B images, N patches, D features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx import nn

from ..checkpoints.config import SiglipConfig
from ..pruners.contract import Signals
from ..resample import shrunk
from .between import Between, Cut, Encoded, patched
from .clip import Encoder


class Embeddings(nn.Module):
    def __init__(self, c: SiglipConfig):
        super().__init__()
        rows, columns = self.grid = c.grid
        size = c.patch_size
        self.patch_embedding = nn.Conv2d(3, c.hidden_size, kernel_size=size, stride=size)
        self.position_embedding = nn.Embedding(rows * columns, c.hidden_size)

    def __call__(self, patches_BND: mx.array, grid: tuple[int, int]) -> mx.array:
        """Patches with their positions; of a smaller grid, positions between."""
        place_ND = self.position_embedding.weight
        if grid != self.grid:
            place_ND = shrunk(place_ND.reshape(1, *self.grid, -1), grid)[0].flatten(0, 1)
        return patches_BND + place_ND


def gelu_by_tanh(x: mx.array) -> mx.array:
    return nn.gelu_approx(x)


class SiglipTower(nn.Module):
    """Pixels to patch features and the signals asked for."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, gelu_by_tanh)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(
        self,
        pixels_BHW3: mx.array,
        want: Mapping[str, int | None] | None = None,
        cuts: Sequence[Cut] = (),
    ) -> Encoded:
        """As CLIPTower; where a method asks for CLS, the mean patch stands in for it."""
        size, want = self.config.patch_size, want or {}
        grid = pixels_BHW3.shape[1] // size, pixels_BHW3.shape[2] // size
        patches_BND = self.embeddings.patch_embedding(pixels_BHW3).flatten(1, 2)
        x_BND = self.embeddings(patches_BND, grid)
        door: dict[str, Any] = {}
        if "patches" in want:
            door["patches_BND"] = patches_BND
        if "pixels" in want:
            door["pixels_BND"] = patched(pixels_BHW3, size)
        layers = self.encoder.layers[: self.config.depth]
        run = Between(Signals(x_BND, grid, **door), want, len(layers), cuts, has_cls=False)
        for i, layer in enumerate(layers):
            x_BND = run.cut(x_BND, i, "before")
            y_BND, q_BHNd, k_BHNd = layer.self_attn(layer.layer_norm1(x_BND), run.bias_BS)
            x_BND = run.cut(x_BND + y_BND, i, "middle", run.read(i, q_BHNd, k_BHNd))
            x_BND = x_BND + layer.mlp(layer.layer_norm2(x_BND))
        return run.end(self.post_layernorm(x_BND) if self.config.post_norm else x_BND)
