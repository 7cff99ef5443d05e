"""Vision transformers: CLIP's (arXiv:2103.00020) and SigLIP's (arXiv:2303.15343, 2502.14786).

Attribute names equal Hugging Face's, so weights need no renaming. CLIP's features are the last
layer's, CLS apart, without `post_layernorm` (which MiniMind2-V never applies); LLaVA reads those
of the last layer but one. SigLIP has no CLS; its features, MiniMind-3V's, are the last layer's
after `post_layernorm`. What makes one embedding of them is in `models/dual_encoder.py`.

Shapes: B images, N patches, S tokens with CLS where there is one, D features, H heads,
d head size.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn

from ...checkpoints.config import CLIPConfig, EncoderConfig, SiglipConfig
from ...inputs.resample import shrink
from ...pruners.contract import Signals
from .pixels import patch_greys, patch_pixels
from .signals import Cut, Encoded, TowerPass, joined

Activation = Callable[[mx.array], mx.array]


class Attention(nn.Module):
    def __init__(self, c: EncoderConfig):
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

    def project_queries(self, x_BSD: mx.array) -> mx.array:
        """(B, H, S, d)."""
        return self.split(self.q_proj(x_BSD))

    def project_keys(self, x_BSD: mx.array) -> mx.array:
        """(B, H, S, d)."""
        return self.split(self.k_proj(x_BSD))

    def __call__(
        self, x_BSD: mx.array, mask: mx.array | str | None, attended_BSD: mx.array | None = None
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """What is read, and the queries, keys and values (B, H, S, d) it was read by.

        `mask` is added to the logits, (B, H, S, S) or of one entry along an axis, or "causal".
        `attended_BSD` is what x attends to, where that is not x.
        """
        attended_BSD = x_BSD if attended_BSD is None else attended_BSD
        q_BHSd, k_BHSd = self.project_queries(x_BSD), self.project_keys(attended_BSD)
        v_BHSd = self.split(self.v_proj(attended_BSD))
        y_BHSd = mx.fast.scaled_dot_product_attention(
            q_BHSd, k_BHSd, v_BHSd, scale=self.scale, mask=mask
        )
        y_BSD = self.out_proj(y_BHSd.swapaxes(1, 2).reshape(x_BSD.shape))
        return y_BSD, q_BHSd, k_BHSd, v_BHSd


def quick_gelu(x: mx.array) -> mx.array:
    """x * sigmoid(1.702 x)."""
    return nn.gelu_fast_approx(x)


class MLP(nn.Module):
    def __init__(self, c: EncoderConfig, act: Activation):
        super().__init__()
        self.act = act
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.act(self.fc1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, c: EncoderConfig, act: Activation):
        super().__init__()
        self.self_attn = Attention(c)
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.mlp = MLP(c, act)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)


def gelu_tanh(x: mx.array) -> mx.array:
    return nn.gelu_approx(x)


# By their names in a config.json.
ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": quick_gelu,
    "gelu": nn.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
}


class Encoder(nn.Module):
    def __init__(self, c: EncoderConfig, act: Activation):
        super().__init__()
        self.layers = [EncoderLayer(c, act) for _ in range(c.num_hidden_layers)]


class Embeddings(nn.Module):
    def __init__(self, c: CLIPConfig, has_cls: bool):
        super().__init__()
        (rows, columns), D, size = c.grid, c.hidden_size, c.patch_size
        self.grid, self.first = c.grid, int(has_cls)  # where the patches begin
        if has_cls:
            self.class_embedding = mx.zeros((D,))
        self.patch_embedding = nn.Conv2d(3, D, kernel_size=size, stride=size, bias=not has_cls)
        self.position_embedding = nn.Embedding(rows * columns + self.first, D)

    def __call__(self, patches_BND: mx.array, grid: tuple[int, int]) -> mx.array:
        """CLS, then the patches, each with its position; of a smaller grid, positions between."""
        x_BSD, position_SD = patches_BND, self.position_embedding.weight
        if grid != self.grid:
            grid_1HWD = position_SD[self.first :].reshape(1, *self.grid, -1)
            position_ND = shrink(grid_1HWD, grid)[0].flatten(0, 1)
            position_SD = mx.concatenate([position_SD[: self.first], position_ND])
        if self.first:
            B, _, D = patches_BND.shape
            cls_B1D = mx.broadcast_to(self.class_embedding, (B, 1, D))
            x_BSD = mx.concatenate([cls_B1D, patches_BND], axis=1)
        return x_BSD + position_SD


def key_mask(bias_BS: mx.array | None, dtype: mx.Dtype) -> mx.array | None:
    """A mask (B, 1, 1, S) of what is added to the logits of each key: the log of how many tokens
    it is."""
    return None if bias_BS is None else bias_BS[:, None, None].astype(dtype)


class VisionTower(nn.Module):
    """Pixels to patch features and the signals asked for; `act` in place of its kind's usual."""

    def __init__(self, config: CLIPConfig, act: Activation | None = None):
        super().__init__()
        self.config, self.has_cls = config, not isinstance(config, SiglipConfig)
        self.embeddings = Embeddings(config, self.has_cls)
        if self.has_cls:
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # sic
        self.encoder = Encoder(config, act or (quick_gelu if self.has_cls else gelu_tanh))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(
        self,
        pixels_BHW3: mx.array,
        want: Mapping[str, int | None] | None = None,
        cuts: Sequence[Cut] = (),
    ) -> Encoded:
        """Encode normalised pixels (B, H, W, 3) to features (B, N, D).

        `want` maps the names of signals to the layer they are read at, counted from 0, or
        from -1 backwards. At each of `cuts` tokens leave, and later layers see fewer. Where a
        method asks for a CLS that is not there, the mean patch stands in for it. Where an image
        decides how many of its tokens leave, each goes through alone.
        """
        if len(pixels_BHW3) > 1 and any(cut.pruner.adapts for cut in cuts):
            images = range(len(pixels_BHW3))
            return joined([self(pixels_BHW3[b : b + 1], want, cuts) for b in images])
        size, want = self.config.patch_size, want or {}
        grid = pixels_BHW3.shape[1] // size, pixels_BHW3.shape[2] // size
        patches_BND = self.embeddings.patch_embedding(pixels_BHW3).flatten(1, 2)
        x_BSD = self.embeddings(patches_BND, grid)
        x_BSD = self.pre_layrnorm(x_BSD) if self.has_cls else x_BSD
        entrance = _entrance(want, patches_BND, pixels_BHW3, size)
        layers, x_BND = self.encoder.layers[: self.config.depth], x_BSD[:, int(self.has_cls) :]
        tower_pass = TowerPass(
            Signals(x_BND, grid, **entrance), want, len(layers), cuts, self.has_cls
        )
        for i, layer in enumerate(layers):
            x_BSD = tower_pass.cut(x_BSD, i, "before")
            y_BSD, keys = _attend(tower_pass, i, layer, x_BSD)
            x_BSD = tower_pass.cut(x_BSD + y_BSD, i, "middle", keys)
            x_BSD = x_BSD + layer.mlp(layer.layer_norm2(x_BSD))
        x_BSD = tower_pass.given_back(x_BSD)
        if len(layers) in tower_pass.want.values():
            _read_behind(tower_pass, len(layers), self.encoder.layers[len(layers)], x_BSD)
        is_normed = isinstance(self.config, SiglipConfig) and self.config.post_norm
        return tower_pass.end(self.post_layernorm(x_BSD) if is_normed else x_BSD)


def _entrance(
    want: Mapping[str, int | None], patches_BND: mx.array, pixels_BHW3: mx.array, size: int
) -> dict[str, Any]:
    """The signals of the tower's input that are wanted; patches have so many rows and columns."""
    entrance: dict[str, Any] = {}
    if "patches" in want:
        entrance["patches_BND"] = patches_BND
    if "pixels" in want:
        entrance["pixels_BND"] = patch_pixels(pixels_BHW3, size)
    if "grey" in want:
        entrance["grey_BNP"] = patch_greys(pixels_BHW3, size)
    return entrance


def _attend(
    tower_pass: TowerPass, number: int, layer: EncoderLayer, x_BSD: mx.array
) -> tuple[mx.array, dict[str, Any]]:
    """What the tokens read in a layer; its queries and keys by name. Signals are noted."""
    attention, mask = layer.self_attn, key_mask(tower_pass.bias_BS, x_BSD.dtype)
    attended_BSD, normed_BSD = tower_pass.attended(x_BSD, number), layer.layer_norm1(x_BSD)
    if attended_BSD is x_BSD:
        y_BSD, q_BHSd, k_BHSd, v_BHSd = attention(normed_BSD, mask)
        return y_BSD, tower_pass.read(number, q_BHSd, k_BHSd, v_BHSd=v_BHSd)
    attended_BSD = layer.layer_norm1(attended_BSD)
    y_BSD, q_BHSd, k_BHSd, _ = attention(normed_BSD, mask, attended_BSD)
    every = partial(attention.project_queries, attended_BSD)
    return y_BSD, tower_pass.read(number, q_BHSd, k_BHSd, all_queries=every)


def _read_behind(tower_pass: TowerPass, number: int, layer: EncoderLayer, x_BSD: mx.array) -> None:
    """Note the signals of the layer that reads what the tower hands over."""
    attention, normed_BSD = layer.self_attn, layer.layer_norm1(x_BSD)
    q_BHSd, k_BHSd = attention.project_queries(normed_BSD), attention.project_keys(normed_BSD)
    tower_pass.read(number, q_BHSd, k_BHSd)
