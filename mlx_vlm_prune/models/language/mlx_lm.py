"""Language models of mlx-lm's, driven from here layer by layer.

mlx-lm's modules are used as they are, and called one at a time: projections, norms, networks,
rotations. Its own forward pass derives positions and masks from the length of a cache; here both
come from the rows.

A family is what differs between them: how its parts are called, and how a layer is put together.

Shapes: B prompts, L new tokens, S rows seen, D features, V words, H heads, G key/value heads,
d head size.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import mlx.core as mx
from mlx import nn

from ...checkpoints.config import MlxLmConfig
from ...checkpoints.errors import UserError
from ...pruners.contract import Stage
from ...pruners.pipeline import Pipeline
from ..cache import LayerCache
from . import mamba, mamba2
from .minimind import ForwardPass, LayerStack, attend
from .rotary import RotaryOffsets

logger = logging.getLogger("mlx_vlm_prune")


class Attention:
    """The attention of one layer. Every row is rotated by its own position."""

    def __init__(self, wrapped: nn.Module, family: "Family", c: MlxLmConfig):
        self.wrapped, self.family = wrapped, family
        self.heads, self.groups = c.num_attention_heads, c.num_key_value_heads

    def __call__(self, x_BLD: mx.array, forward_pass: ForwardPass, cache: LayerCache) -> mx.array:
        B, L, _ = x_BLD.shape
        q_BHLd = self.rotated_queries(x_BLD, forward_pass.rotary)
        k_BGLd = self.rotated_keys(x_BLD, forward_pass.rotary)
        v_BGLd = self.wrapped.v_proj(x_BLD).reshape(B, L, self.groups, -1).swapaxes(1, 2)
        k_BGSd, v_BGSd = cache.append(k_BGLd, v_BGLd, forward_pass)
        mask = forward_pass.mask(cache.held, x_BLD.dtype)
        y_BHLd = attend(self.family.cast_queries(q_BHLd), k_BGSd, v_BGSd, mask, forward_pass.fold)
        out = self.wrapped[self.family.o_proj]
        return out(y_BHLd.astype(x_BLD.dtype).swapaxes(1, 2).reshape(B, L, -1))

    def rotated_queries(self, x_BLD: mx.array, rotary: RotaryOffsets) -> mx.array:
        """(B, H, L, d)."""
        return self._rotated(self.wrapped.q_proj(x_BLD), self.heads, "q_norm", rotary)

    def rotated_keys(self, x_BLD: mx.array, rotary: RotaryOffsets) -> mx.array:
        """(B, G, L, d)."""
        return self._rotated(self.wrapped.k_proj(x_BLD), self.groups, "k_norm", rotary)

    def _rotated(self, x: mx.array, heads: int, norm: str, rotary: RotaryOffsets) -> mx.array:
        """Normed where the family does so, and rotated."""
        x = x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)
        return self.rotated(self.wrapped[norm](x) if norm in self.wrapped else x, rotary)

    def rotated(self, x_BHLd: mx.array, rotary: RotaryOffsets) -> mx.array:
        """Heads, rotated by mlx-lm's rotation."""
        return rotary.rotate(self.wrapped.rope, x_BHLd)


class Layer:
    """One of mlx-lm's layers, whose modules are called one by one."""

    def __init__(self, wrapped: nn.Module, family: "Family", c: MlxLmConfig):
        self.wrapped, self.family, self.c = wrapped, family, c

    @property
    def self_attn(self) -> Attention:
        return Attention(self.wrapped.self_attn, self.family, self.c)

    @property
    def input_layernorm(self) -> nn.Module:
        return self.wrapped.input_layernorm

    def __call__(self, x_BLD: mx.array, forward_pass: ForwardPass, cache: Any) -> mx.array:
        return self.family.block(self, x_BLD, forward_pass, cache)


def llama_block(
    layer: Layer, x_BLD: mx.array, forward_pass: ForwardPass, cache: LayerCache
) -> mx.array:
    """Llama's layer, and most others': attention, then the network."""
    wrapped = layer.wrapped
    x_BLD = x_BLD + layer.self_attn(wrapped.input_layernorm(x_BLD), forward_pass, cache)
    return x_BLD + wrapped.mlp(wrapped.post_attention_layernorm(x_BLD))


def _uncast(x: mx.array) -> mx.array:
    return x


@dataclass(frozen=True)
class Family:
    """`module` of `mlx_lm.models`, what its parts are called, and how a layer is computed."""

    module: str
    body: str = "model"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    o_proj: str = "o_proj"
    block: Callable[[Layer, mx.array, ForwardPass, Any], mx.array] = llama_block
    cast_queries: Callable[[mx.array], mx.array] = _uncast  # queries, before they meet the keys
    cache: Callable[[], Any] = LayerCache
    scales_embeddings: bool = False  # times the root of hidden_size
    attends: bool = True  # False without attention
    sizes: Mapping[str, Any] = field(default_factory=dict)  # those that text_config has not


def phi_block(
    layer: Layer, x_BLD: mx.array, forward_pass: ForwardPass, cache: LayerCache
) -> mx.array:
    """Phi's layer: attention and network read the same normed rows."""
    normed_BLD = layer.wrapped.input_layernorm(x_BLD)
    return layer.self_attn(normed_BLD, forward_pass, cache) + layer.wrapped.mlp(normed_BLD) + x_BLD


def gemma_block(
    layer: Layer, x_BLD: mx.array, forward_pass: ForwardPass, cache: LayerCache
) -> mx.array:
    """Gemma's layer. Its GELU is the one by tanh, which mlx-lm's own network has not."""
    wrapped, net = layer.wrapped, layer.wrapped.mlp
    x_BLD = x_BLD + layer.self_attn(wrapped.input_layernorm(x_BLD), forward_pass, cache)
    normed_BLD = wrapped.post_attention_layernorm(x_BLD)
    inner = nn.gelu_approx(net.gate_proj(normed_BLD)) * net.up_proj(normed_BLD)
    return x_BLD + net.down_proj(inner)


def _float32(q_BHLd: mx.array) -> mx.array:
    """Phi's queries: their products with keys overflow half precision."""
    return q_BHLd.astype(mx.float32)


FAMILIES = {
    "llama": Family("llama"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "phi": Family(
        "phi", norm="final_layernorm", o_proj="dense", block=phi_block, cast_queries=_float32
    ),
    "gemma": Family("gemma", block=gemma_block, scales_embeddings=True),
    "mamba": Family(
        "mamba", body="backbone", embedding="embeddings", norm="norm_f", block=mamba.block,
        cache=mamba.MambaState, attends=False,
    ),
    "mamba2": Family(
        "mamba2", body="backbone", embedding="embeddings", norm="norm_f", block=mamba2.block,
        cache=mamba.MambaState, attends=False, sizes={"time_step_limit": mamba2.ANY_STEP},
    ),
}  # fmt: skip
ROW_SIGNALS = {"before", "normed"}  # signals that need no attention


class MlxLm(LayerStack):
    """Embeddings with positions to logits, as `MiniMind`, through the layers of a model of
    mlx-lm's; tensors are called as mlx-lm calls them."""

    def __init__(self, config: MlxLmConfig):
        super().__init__()
        self.config, self.family = config, FAMILIES[config.model_type]
        stock = _build(config, self.family)
        self[self.family.body] = stock[self.family.body]
        if not config.text_config["tie_word_embeddings"]:
            sizes = config.hidden_size, config.vocab_size
            self.lm_head = nn.Linear(*sizes, bias=config.text_config["lm_head_bias"])

    @property
    def layers(self) -> list[Layer]:
        parts = self[self.family.body].layers
        return [Layer(part, self.family, self.config) for part in parts]

    @property
    def norm(self) -> nn.Module:
        return self[self.family.body][self.family.norm]

    def embed_tokens(self, ids: mx.array) -> mx.array:
        """Embeddings of words, scaled where the family does so; visual tokens never are."""
        x = self._embedding(ids)
        return x * self.config.hidden_size**0.5 if self.family.scales_embeddings else x

    @property
    def _embedding(self) -> nn.Module:
        return self[self.family.body][self.family.embedding]

    def check(self, pipeline: Pipeline) -> None:
        """UserError for a method that cannot work between these layers."""
        kind = self.config.model_type
        for step in pipeline.at(Stage.DECODER):
            if step.name == "twig":
                raise UserError(
                    f"twig cannot prune a {kind} of mlx-lm's: a twig is made of layers of our own"
                )
            if not self.family.attends and set(step.method.needs) - ROW_SIGNALS:
                raise UserError(
                    f"{step.name} cannot prune a {kind}: it reads attention, which a {kind} has"
                    " none of; between its layers v2drop and vtw can, and methods before them all"
                )
        for enhancer in () if self.family.attends else pipeline.enhancers:
            reads = "adds to the attention that kept tokens get"
            if not enhancer.method.attention_bias:
                reads = "reads how attention rotates positions"
            raise UserError(
                f"{enhancer.name} cannot work in a {kind}: it {reads}, and a {kind} has none"
            )

    def make_cache(self) -> list[Any]:
        return [self.family.cache() for _ in range(self.depth)]

    def rotary(self, positions_BL: mx.array, contiguous: bool = False) -> RotaryOffsets:
        """What each layer's own rotation is called with."""
        return RotaryOffsets(positions_BL, contiguous)

    def logits(self, x_BLD: mx.array) -> mx.array:
        """Of the next word, from the last layer's hidden states."""
        x_BLD = self.norm(x_BLD)
        return self.lm_head(x_BLD) if "lm_head" in self else self._embedding.as_linear(x_BLD)


def _build(config: MlxLmConfig, family: Family) -> Any:
    """A model of mlx-lm's, its weights not yet read. Raises UserError without mlx-lm."""
    if "mlx_lm" not in sys.modules:
        logger.info("importing mlx-lm for a %s model; this takes some seconds", config.model_type)
    try:
        models = import_module(f"mlx_lm.models.{family.module}")
    except ImportError as problem:
        raise UserError(
            f"a {config.model_type} language model needs mlx-lm: {mamba.INSTALL} ({problem})"
        ) from None
    return models.Model(models.ModelArgs.from_dict({**config.text_config, **family.sizes}))
