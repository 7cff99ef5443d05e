"""CLIP's vision transformer (arXiv:2103.00020), as MiniMind2-V reads it.

Module names are Hugging Face's, so a CLIP folder's `vision_model.*` weights load
unrenamed. The features are the last layer's, without CLS and without
`post_layernorm`.

Shapes: B images, N patches, S = N + 1 tokens with CLS, D features, H heads, d head size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.errors import UserError

from ..pruners import Reduction, Signals, Step, reduce


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

    def forward(self, x_BSD: Tensor, bias_B11S: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What is read, and the queries and keys (B, H, S, d) it was read by.

        `bias_B11S` is the log of how many patches each token stands for.
        """
        q, k, v = (self.split(p(x_BSD)) for p in (self.q_proj, self.k_proj, self.v_proj))
        y_BHSd = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_B11S)
        return self.out_proj(y_BHSd.transpose(1, 2).flatten(-2)), q, k


def attention(q_BHSd: Tensor, k_BHSd: Tensor, bias_B11S: Tensor | None) -> Tensor:
    """Who attends to whom, mean over heads, (B, S, S)."""
    logits_BHSS = (q_BHSd @ k_BHSd.mT).float() / q_BHSd.shape[-1] ** 0.5
    if bias_B11S is not None:
        logits_BHSS = logits_BHSS + bias_B11S
    return logits_BHSS.softmax(-1).mean(1)


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


class Embeddings(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(c.hidden_size) * 0.02)
        self.patch_embedding = nn.Conv2d(
            3, c.hidden_size, kernel_size=c.patch_size, stride=c.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(c.side**2 + 1, c.hidden_size)

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
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))


@dataclass(frozen=True)
class Encoded:
    """The tokens on their way through the tower: what they are, and what they came from."""

    signals: Signals
    kept: Reduction | None  # of the whole image, where tokens left
    cls_B1D: Tensor
    N: int  # of the whole image

    def now(self, x_BSD: Tensor) -> "Encoded":
        signals = replace(self.signals, x_BND=x_BSD[:, 1:])
        return replace(self, signals=signals, cls_B1D=x_BSD[:, :1])

    @property
    def bias_B11S(self) -> Tensor | None:
        """Log of how many patches each token is; CLS is one."""
        if self.signals.size_BN is None:
            return None
        return F.pad(self.signals.size_BN.log(), (1, 0))[:, None, None]

    def read(self, names: set[str], keys: dict[str, Tensor], q: Tensor, k: Tensor) -> "Encoded":
        """Note the signals that are wanted of this layer."""
        seen: dict[str, Any] = {
            f"{name}_BNHd": keys[f"{name}_BNHd"] for name in names & {"keys", "queries"}
        }
        if "cls_query" in names:
            seen["cls_query_BHd"] = q[:, :, 0]
        if names - {"keys", "queries", "cls_query"}:
            attention_BSS = attention(q, k, self.bias_B11S)
            received_BN = attention_BSS.mean(1)[:, 1:]
            columns = dict.fromkeys(("received_attention", "object_attention"), received_BN)
            columns["cls_attention"] = columns["local_attention"] = attention_BSS[:, 0, 1:]
            seen |= {f"{name}_BN": column for name, column in columns.items() if name in names}
        return replace(self, signals=replace(self.signals, **seen))

    def cut(self, step: Step, K: int, **keys: Any) -> "Encoded":
        """After a step that leaves K tokens."""
        kept = reduce(step.name, replace(self.signals, **keys), K, **step.options)
        assert kept.index_BK is not None
        signals = self.signals.rows(kept.index_BK)
        if step.merges and kept.weight_BKN is not None:
            assert self.signals.size_BN is not None
            members = (kept.weight_BKN > 0).to(self.signals.size_BN)
            signals = replace(signals, size_BN=(members @ self.signals.size_BN[..., None])[..., 0])
        signals = replace(signals, x_BND=kept.tokens(self.signals.x_BND))
        return replace(self, signals=signals, kept=kept.after(self.kept, self.N))


class CLIPTower(nn.Module):
    """Pixels to patch features and the signals asked for."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # sic
        self.encoder = Encoder(config)
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
        layers, want = self.encoder.layers, want or {}
        for number in want.values():
            if number is not None and not -len(layers) <= number < len(layers):
                raise UserError(
                    f"the tower has no layer {number}; give {-len(layers)} to {len(layers) - 1}"
                )
        run = self.enter(pixels_B3HW, set(want), any(step.merges for *_, step in cuts))
        for i, layer in enumerate(layers):
            assert isinstance(layer, Layer)
            for at, place, K, step in cuts:
                if (at, place) == (i, "before"):
                    run = run.cut(step, K)
            x_BSD = torch.cat([run.cls_B1D, run.signals.x_BND], dim=1)
            bias_B11S = run.bias_B11S
            y_BSD, q, k = layer.self_attn(layer.layer_norm1(x_BSD), bias_B11S)
            by_token = {"queries_BNHd": q.transpose(1, 2), "keys_BNHd": k.transpose(1, 2)}
            keys = {name: vectors[:, 1:] for name, vectors in by_token.items()}
            names = {name for name, at in want.items() if at is not None and at % len(layers) == i}
            run = run.now(x_BSD + y_BSD).read(names, keys, q, k)
            for at, place, K, step in cuts:
                if (at, place) == (i, "middle"):
                    run = run.cut(step, K, **keys)
            x_BSD = torch.cat([run.cls_B1D, run.signals.x_BND], dim=1)
            run = run.now(x_BSD + layer.mlp(layer.layer_norm2(x_BSD)))
        return run

    def enter(self, pixels_B3HW: Tensor, names: set[str], merges: bool) -> Encoded:
        """What goes into the first layer; `merges` says that tokens will stand for several."""
        size = self.config.patch_size
        patches_BND = self.embeddings.patch_embedding(pixels_B3HW).flatten(2).mT
        grid = (pixels_B3HW.shape[2] // size, pixels_B3HW.shape[3] // size)
        x_BSD = self.pre_layrnorm(self.embeddings(patches_BND, grid))
        signals = Signals(
            x_BSD[:, 1:], grid, size_BN=torch.ones_like(patches_BND[..., 0]) if merges else None,
            patches_BND=patches_BND if "patches" in names else None,
            pixels_BND=F.unfold(pixels_B3HW, size, stride=size).mT if "pixels" in names else None,
        )  # fmt: skip
        return Encoded(signals, None, x_BSD[:, :1], grid[0] * grid[1])
