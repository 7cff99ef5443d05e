"""Vision transformers: CLIP's (arXiv:2103.00020) and SigLIP's (arXiv:2303.15343).

Module names are Hugging Face's, so a folder's `vision_model.*` weights load unrenamed. CLIP's
features are the last layer's, without CLS and without `post_layernorm`. SigLIP has no CLS: the mean
patch stands in where a method asks for it; its features are the last layer's after
`post_layernorm`.

Shapes: B images, N patches, S tokens with CLS where there is one, D features, H heads,
d head size.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlx_vlm_prune.checkpoints.config import CLIPConfig, SiglipConfig
from mlx_vlm_prune.checkpoints.errors import UserError

from ...pruners import Step
from .signals import Encoded, enter, joined, run_layers

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

    def forward(
        self, x_BSD: Tensor, bias_B11S: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is read, and the queries, keys and values (B, H, S, d) it was read by.

        `bias_B11S` is the log of how many patches each token stands for.
        """
        q, k, v = (self.split(p(x_BSD)) for p in (self.q_proj, self.k_proj, self.v_proj))
        y_BHSd = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_B11S)
        return self.out_proj(y_BHSd.transpose(1, 2).flatten(-2)), q, k, v


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


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class Encoder(nn.Module):
    def __init__(self, c: CLIPConfig, act: Activation):
        super().__init__()
        self.layers = nn.ModuleList(Layer(c, act) for _ in range(c.num_hidden_layers))


class Embeddings(nn.Module):
    def __init__(self, c: CLIPConfig, has_cls: bool):
        super().__init__()
        (rows, columns), D, size = c.grid, c.hidden_size, c.patch_size
        self.grid, self.first = c.grid, int(has_cls)  # where the patches begin
        if has_cls:
            self.class_embedding = nn.Parameter(torch.randn(D) * 0.02)
        self.patch_embedding = nn.Conv2d(3, D, kernel_size=size, stride=size, bias=not has_cls)
        self.position_embedding = nn.Embedding(rows * columns + self.first, D)

    def forward(self, patches_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """CLS and the patches, with positions; for a smaller grid those are interpolated."""
        x_BSD, position_SD = patches_BND, self.position_embedding.weight
        if grid != self.grid:
            grid_1DHW = position_SD[self.first :].T.reshape(1, -1, *self.grid)
            small_1DHW = F.interpolate(grid_1DHW, grid, mode="bilinear", antialias=True)
            position_SD = torch.cat([position_SD[: self.first], small_1DHW[0].flatten(1).T])
        if self.first:
            cls_B1D = self.class_embedding.expand(len(patches_BND), 1, -1)
            x_BSD = torch.cat([cls_B1D, patches_BND], dim=1)
        return x_BSD + position_SD


class VisionTower(nn.Module):
    """Pixels to patch features and the signals asked for."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config, self.has_cls = config, not isinstance(config, SiglipConfig)
        self.embeddings = Embeddings(config, self.has_cls)
        if self.has_cls:
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # sic
        self.encoder = Encoder(config, quick_gelu if self.has_cls else gelu_tanh)
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
        if len(pixels_B3HW) > 1 and any(step.adapts for *_, step in cuts):
            return joined([self(pixels_13HW, want, cuts) for pixels_13HW in pixels_B3HW.split(1)])
        patches_BDHW = self.embeddings.patch_embedding(pixels_B3HW)
        grid = (patches_BDHW.shape[2], patches_BDHW.shape[3])
        patches_BND = patches_BDHW.flatten(2).mT
        x_BSD = self.embeddings(patches_BND, grid)
        x_BSD = self.pre_layrnorm(x_BSD) if self.has_cls else x_BSD
        first = int(self.has_cls)
        run = enter(x_BSD, first, patches_BND, pixels_B3HW, grid, set(want or {}), cuts)
        depth = self.config.depth
        if depth in (want or {}).values() and depth == len(self.encoder.layers):
            raise UserError(f"the tower has no layer {depth}; give {-depth} to {depth - 1}")
        run = run_layers(self.encoder.layers[:depth], run, want or {}, cuts)
        if behind := {name for name, at in (want or {}).items() if at == depth}:
            layer: Any = self.encoder.layers[depth]
            _, q, k, _ = layer.self_attn(layer.layer_norm1(run.x_BSD), None)
            by_token = {"queries_BNHd": q.transpose(1, 2), "keys_BNHd": k.transpose(1, 2)}
            run = run.read(behind, {n: t[:, run.first :] for n, t in by_token.items()}, q, k)
        is_normed = isinstance(self.config, SiglipConfig) and self.config.post_norm
        return run.with_tokens(self.post_layernorm(run.x_BSD)) if is_normed else run
