"""CLIP's vision transformer (arXiv:2103.00020), as MiniMind2-V reads it.

Module names are Hugging Face's, so a CLIP folder's `vision_model.*` weights load
unrenamed. The features are the last layer's, without CLS and without
`post_layernorm`.

Shapes: B images, N patches, S = N + 1 tokens with CLS, D features, H heads, d head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.errors import UserError

from ..pruners import Signals


@dataclass(frozen=True)
class CLIPConfig:
    """The fields of a CLIP vision config.json; the defaults are ViT-B/16."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    layer_norm_eps: float = 1e-5

    @property
    def side(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


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

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = (self.split(p(x_BSD)) for p in (self.q_proj, self.k_proj, self.v_proj))
        y_BHSd = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y_BHSd.transpose(1, 2).flatten(-2))

    def cls_row(self, x_BSD: Tensor) -> Tensor:
        """Attention of CLS to the patches, mean over heads, (B, N); CLS's own share left out."""
        q_BH1d = self.split(self.q_proj(x_BSD[:, :1]))
        k_BHSd = self.split(self.k_proj(x_BSD))
        row_BHS = (q_BH1d @ k_BHSd.mT).squeeze(2) / q_BH1d.shape[-1] ** 0.5
        return row_BHS.float().softmax(-1).mean(1)[:, 1:]


class MLP(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # "quick GELU"


class Layer(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.self_attn = Attention(c)
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.mlp = MLP(c)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(c.hidden_size) * 0.02)
        self.patch_embedding = nn.Conv2d(
            3, c.hidden_size, kernel_size=c.patch_size, stride=c.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(c.side**2 + 1, c.hidden_size)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        x_BND = self.patch_embedding(pixels_B3HW).flatten(2).mT
        cls_B1D = self.class_embedding.expand(len(x_BND), 1, -1)
        return torch.cat([cls_B1D, x_BND], dim=1) + self.position_embedding.weight


class Encoder(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))


class CLIPTower(nn.Module):
    """Pixels to patch features and the signals asked for."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # sic
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels_B3HW: Tensor, want: Mapping[str, int] | None = None) -> Signals:
        """Encode (B, 3, H, W) pixels; `want` maps "cls_attention" and "keys" to a layer.

        Layers count from 0, or from -1 backwards. Returns features (B, N, D). Raises
        UserError for a layer that does not exist.
        """
        layers = self.encoder.layers
        for number in (want or {}).values():
            if not -len(layers) <= number < len(layers):
                raise UserError(
                    f"the tower has no layer {number}; give {-len(layers)} to {len(layers) - 1}"
                )
        wanted = {name: layer % len(layers) for name, layer in (want or {}).items()}
        x_BSD = self.pre_layrnorm(self.embeddings(pixels_B3HW))
        seen: dict[str, Tensor] = {}
        for i, layer in enumerate(layers):
            assert isinstance(layer, Layer)
            attention, normed = layer.self_attn, layer.layer_norm1(x_BSD)
            if wanted.get("cls_attention") == i:
                seen["cls_attention_BN"] = attention.cls_row(normed)
            if wanted.get("keys") == i:
                seen["keys_BND"] = attention.k_proj(normed)[:, 1:]
            x_BSD = layer(x_BSD)
        side = self.config.side
        return Signals(x_BND=x_BSD[:, 1:], grid=(side, side), **seen)
