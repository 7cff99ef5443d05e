"""CLIP's vision transformer (arXiv:2103.00020), as MiniMind2-V reads it.

Module names are Hugging Face's, so a CLIP folder's `vision_model.*` weights load
unrenamed. The features are the last layer's, without CLS and without
`post_layernorm`.

Shapes: B images, N patches, S = N + 1 tokens with CLS, D features, H heads, d head size.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlx_vlm_prune.checkpoints.config import CLIPConfig

from ..pruners import Step
from .between import Encoded, enter, through

Activation = Callable[[Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.heads = c.num_attention_heads
        self.k_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.v_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size)

    def split(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x_BSD: Tensor, bias_B11S: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What is read, and the queries and keys (B, H, S, d) it was read by.

        `bias_B11S` is the log of how many patches each token stands for.
        """
        q, k, v = (self.split(p(x_BSD)) for p in (self.q_proj, self.k_proj, self.v_proj))
        y_BHSd = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_B11S)
        return self.out_proj(y_BHSd.transpose(1, 2).flatten(-2)), q, k


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    def __init__(self, c: CLIPConfig, act: Activation):
        super().__init__()
        self.act = act
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, c: CLIPConfig, act: Activation):
        super().__init__()
        self.self_attn = Attention(c)
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.mlp = MLP(c, act)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)


class Embeddings(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(c.hidden_size) * 0.02)
        self.patch_embedding = nn.Conv2d(
            3, c.hidden_size, kernel_size=c.patch_size, stride=c.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(c.grid[0] * c.grid[1] + 1, c.hidden_size)

    def forward(self, patches_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """CLS and the patches, with positions; for a smaller grid those are interpolated."""
        cls_B1D = self.class_embedding.expand(len(patches_BND), 1, -1)
        place_SD = self.position_embedding.weight
        side = math.isqrt(len(place_SD) - 1)
        if grid != (side, side):
            whole = place_SD[1:].T.reshape(1, -1, side, side)
            small = F.interpolate(whole, grid, mode="bilinear", antialias=True)
            place_SD = torch.cat([place_SD[:1], small[0].flatten(1).T])
        return torch.cat([cls_B1D, patches_BND], dim=1) + place_SD


class Encoder(nn.Module):
    """The layers, which SigLIP has too, with another activation."""

    def __init__(self, c: CLIPConfig, act: Activation):
        super().__init__()
        self.layers = nn.ModuleList(Layer(c, act) for _ in range(c.num_hidden_layers))


class CLIPTower(nn.Module):
    """Pixels to patch features and the signals asked for."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # sic
        self.encoder = Encoder(config, quick_gelu)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        pixels_B3HW: Tensor,
        want: Mapping[str, int | None] | None = None,
        cuts: Sequence[tuple[int, str, int, Step]] = (),
    ) -> Encoded:
        """Encode (B, 3, H, W) pixels; `want` maps names of signals to the layer they are of.

        Layers count from 0, or from -1 backwards. At each of `cuts` (layer, "before" it or
        in its "middle", K, step) the step leaves K tokens. Raises UserError for a layer
        that does not exist.
        """
        patches_BDHW = self.embeddings.patch_embedding(pixels_B3HW)
        grid = (patches_BDHW.shape[2], patches_BDHW.shape[3])
        patches_BND = patches_BDHW.flatten(2).mT
        x_BSD = self.pre_layrnorm(self.embeddings(patches_BND, grid))
        run = enter(x_BSD, 1, patches_BND, pixels_B3HW, grid, set(want or {}), cuts)
        return through(self.encoder.layers[: self.config.depth], run, want or {}, cuts)
