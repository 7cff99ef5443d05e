"""CLIP's vision transformer (arXiv:2103.00020), as MiniMind2-V reads it.

Attribute names equal Hugging Face's, so weights need no renaming. The features are
the last layer's, CLS dropped, without `post_layernorm` (which MiniMind2-V never applies).

Shapes: B images, N patches, S = N + 1 tokens with CLS, D features, H heads, d head size.
"""

from dataclasses import dataclass

import mlx.core as mx
from mlx import nn

from ..pruners.contract import Signals


@dataclass(frozen=True)
class CLIPConfig:
    """The fields of `vision_config`; the defaults are ViT-B/16."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    layer_norm_eps: float = 1e-5

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side


class Attention(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.num_heads = c.num_attention_heads
        self.scale = (c.hidden_size // c.num_attention_heads) ** -0.5
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.k_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.v_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size)

    def split(self, x_BSD: mx.array) -> mx.array:
        B, S, _ = x_BSD.shape
        return x_BSD.reshape(B, S, self.num_heads, -1).swapaxes(1, 2)

    def __call__(self, x_BSD: mx.array) -> mx.array:
        q_BHSd, k_BHSd, v_BHSd = (
            self.split(project(x_BSD)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        y_BHSd = mx.fast.scaled_dot_product_attention(q_BHSd, k_BHSd, v_BHSd, scale=self.scale)
        return self.out_proj(y_BHSd.swapaxes(1, 2).reshape(x_BSD.shape))

    def cls_row(self, x_BSD: mx.array) -> mx.array:
        """Attention of CLS to the patches, mean over heads, (B, N) float32: one row, not S x S."""
        q_BH1d = self.split(self.q_proj(x_BSD[:, :1]))
        k_BHSd = self.split(self.k_proj(x_BSD))
        row_BHS = (q_BH1d @ k_BHSd.swapaxes(2, 3))[:, :, 0] * self.scale
        return mx.softmax(row_BHS.astype(mx.float32), axis=-1).mean(axis=1)[:, 1:]


class MLP(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(nn.gelu_fast_approx(self.fc1(x)))  # x * sigmoid(1.702 x), "quick GELU"


class EncoderLayer(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.self_attn = Attention(c)
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.mlp = MLP(c)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def __call__(self, x_BSD: mx.array) -> mx.array:
        x_BSD = x_BSD + self.self_attn(self.layer_norm1(x_BSD))
        return x_BSD + self.mlp(self.layer_norm2(x_BSD))


class Encoder(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.layers = [EncoderLayer(c) for _ in range(c.num_hidden_layers)]


class Embeddings(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        rows, columns = c.grid
        self.class_embedding = mx.zeros((c.hidden_size,))
        self.patch_embedding = nn.Conv2d(
            3, c.hidden_size, kernel_size=c.patch_size, stride=c.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(rows * columns + 1, c.hidden_size)

    def __call__(self, pixels_BHW3: mx.array) -> mx.array:
        x_BND = self.patch_embedding(pixels_BHW3).flatten(1, 2)
        B, _, D = x_BND.shape
        cls_B1D = mx.broadcast_to(self.class_embedding, (B, 1, D))
        return mx.concatenate([cls_B1D, x_BND], axis=1) + self.position_embedding.weight


class CLIPTower(nn.Module):
    """Pixels to patch features and the signals asked for."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # sic
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, pixels_BHW3: mx.array, want: dict[str, int] | None = None) -> Signals:
        """Encode normalised pixels (B, H, W, 3) to features (B, N, D).

        `want` maps "cls_attention" and "keys" to the layer they are read at, counted
        from 0, or from -1 backwards.
        """
        layers = self.encoder.layers
        at = {name: range(len(layers))[layer] for name, layer in (want or {}).items()}
        seen: dict[str, mx.array] = {}
        x_BSD = self.pre_layrnorm(self.embeddings(pixels_BHW3))
        for i, layer in enumerate(layers):
            if i in at.values():
                seen |= self.read(layer, x_BSD, {name for name in at if at[name] == i})
            x_BSD = layer(x_BSD)
        return Signals(x_BND=x_BSD[:, 1:], grid=self.config.grid, **seen)

    @staticmethod
    def read(layer: EncoderLayer, x_BSD: mx.array, names: set[str]) -> dict[str, mx.array]:
        """The signals of one layer, from what goes into its attention."""
        seen, normed_BSD = {}, layer.layer_norm1(x_BSD)
        if "cls_attention" in names:
            seen["cls_attention_BN"] = layer.self_attn.cls_row(normed_BSD)
        if "keys" in names:
            seen["keys_BND"] = layer.self_attn.k_proj(normed_BSD)[:, 1:]
        return seen
