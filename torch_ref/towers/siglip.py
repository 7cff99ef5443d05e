"""SigLIP's vision transformer (arXiv:2303.15343), as MiniMind-3V reads it.

Module names are Hugging Face's. There is no CLS token: the mean patch stands in where a
method asks for it. The features are the last layer's after `post_layernorm`.

Shapes: B images, N patches, D features.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from mlx_vlm_prune.checkpoints.config import SiglipConfig

from ..pruners import Step
from .between import Encoded, enter, through
from .clip import Encoder


class Embeddings(nn.Module):
    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            3, c.hidden_size, kernel_size=c.patch_size, stride=c.patch_size
        )
        self.position_embedding = nn.Embedding(c.grid[0] * c.grid[1], c.hidden_size)

    def forward(self, patches_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """The patches with positions; for a smaller grid those are interpolated."""
        place_ND = self.position_embedding.weight
        side = math.isqrt(len(place_ND))
        if grid != (side, side):
            whole = place_ND.T.reshape(1, -1, side, side)
            small = F.interpolate(whole, grid, mode="bilinear", antialias=True)
            place_ND = small[0].flatten(1).T
        return patches_BND + place_ND


def gelu_by_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class SiglipTower(nn.Module):
    """Pixels to patch features and the signals asked for."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, gelu_by_tanh)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        pixels_B3HW: Tensor,
        want: Mapping[str, int | None] | None = None,
        cuts: Sequence[tuple[int, str, int, Step]] = (),
    ) -> Encoded:
        """As CLIPTower's."""
        patches_BDHW = self.embeddings.patch_embedding(pixels_B3HW)
        grid = (patches_BDHW.shape[2], patches_BDHW.shape[3])
        patches_BND = patches_BDHW.flatten(2).mT
        x_BND = self.embeddings(patches_BND, grid)
        run = enter(x_BND, 0, patches_BND, pixels_B3HW, grid, set(want or {}), cuts)
        run = through(self.encoder.layers[: self.config.depth], run, want or {}, cuts)
        return run.now(self.post_layernorm(run.signals.x_BND)) if self.config.post_norm else run
