"""A language model's layers one by one, each row at a position of its own.

Qwen's layers take positions. Llama's count them: rotation starts at the cache's offset. So Llama's
rows are rotated here, each as a prompt of one row that starts at its position, and a cache with
fewer rows than came before is a `ShiftedCache`.

Shapes: B prompts, L rows, S rows held, D features, G key/value heads, R queries of each, d head
size.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import mlx.core as mx

from ..models.language.minimind import grouped
from ..models.language.rotary import mean_rotation
from .biased_cache import BiasedCache, add_biases


class LanguageLayers(ABC):
    """The layers of a host's language model, by the contract of `models.language.contract`."""

    axes: ClassVar[int]  # of positions
    has_window: ClassVar[bool] = False  # do some layers hold a window of rows?

    def __init__(self, model: Any):
        self.model = model
        self.body = getattr(model, "model", model)  # what has the layers

    @property
    def depth(self) -> int:
        return len(self.body.layers)

    @property
    def window(self) -> int | None:
        """How many rows a layer with a window of attention holds."""
        return None

    def enter(self, x_BLD: mx.array) -> mx.array:
        """Embeddings as the first layer takes them in."""
        return x_BLD

    def make_cache(self) -> list[Any]:
        """mlx-vlm's own, one a layer."""
        from mlx_vlm.models.cache import make_prompt_cache

        return make_prompt_cache(self.model)

    def norm(self, x_BLD: mx.array) -> mx.array:
        """The norm after the last layer."""
        return self.body.norm(x_BLD)

    def held_keys(self, layer_cache: Any) -> mx.array:
        """(1, G, S, d)."""
        return layer_cache.state[0]

    def held_values(self, layer_cache: Any) -> mx.array:
        """(1, G, S, d)."""
        return layer_cache.state[1]

    def mean_rotation(self, number: int, positions_BL: mx.array) -> tuple[mx.array, mx.array]:
        """The means of the cosines and of the sines of a layer's rotation, (B, L) each."""
        attention = self.body.layers[number].self_attn
        head_dim = getattr(attention, "head_dim", self.model.head_dim)
        return mean_rotation(partial(self.rotate, attention), positions_BL, head_dim)

    def run(
        self, numbers: range, x_BLD: mx.array, positions_BL: mx.array, cache: list[Any],
        *, contiguous: bool = False, padding: Sequence[int] = (), bias_BL: mx.array | None = None,
    ) -> mx.array:  # fmt: skip
        """Hidden states through some of the layers, whose caches grow by L rows. Biased ones make
        the masks of their layers from then on."""
        assert not any(padding), "a prompt is read alone"
        if bias_BL is not None:  # in float32, from which whole numbers come back
            add_biases(cache, numbers, bias_BL.astype(mx.float32))
        for number in numbers:
            x_BLD = self.block(number, x_BLD, positions_BL, cache[number])
        return x_BLD

    @abstractmethod
    def block(self, number: int, x_BLD: mx.array, positions_BL: mx.array, cache: Any) -> mx.array:
        """One layer, whose cache grows by L rows."""

    @abstractmethod
    def rotate(self, attention: Any, x_BHLd: mx.array, positions_BL: mx.array) -> mx.array:
        """Queries or keys, rotated by their positions."""

    def rotated_queries(self, number: int, x_BLD: mx.array, positions_BL: mx.array) -> mx.array:
        """The queries that a layer makes of its input, as its keys are grouped, (B, G, R, L, d)."""
        layer = self.body.layers[number]
        attention, y_BLD = layer.self_attn, layer.input_layernorm(x_BLD)
        return grouped(self.heads(attention, "q", y_BLD, positions_BL), attention.n_kv_heads)

    def rotated_keys(self, number: int, x_BLD: mx.array, positions_BL: mx.array) -> mx.array:
        """The keys that a layer makes of its input, (B, G, L, d)."""
        layer = self.body.layers[number]
        return self.heads(layer.self_attn, "k", layer.input_layernorm(x_BLD), positions_BL)

    def heads(
        self, attention: Any, which: Literal["q", "k"], y_BLD: mx.array, positions_BL: mx.array
    ) -> mx.array:
        """The rotated queries or keys of a normed input, (B, H, L, d)."""
        count = attention.n_heads if which == "q" else attention.n_kv_heads
        x_BHLd = split_heads(getattr(attention, f"{which}_proj")(y_BLD), count)
        norm = getattr(attention, f"{which}_norm", None)  # Qwen3's, of each head
        return self.rotate(attention, x_BHLd if norm is None else norm(x_BHLd), positions_BL)


class RopeOffsetLayers(LanguageLayers):
    """Llama's: rows are rotated here, since the layers would count positions."""

    axes = 1

    def block(self, number: int, x_BLD: mx.array, positions_BL: mx.array, cache: Any) -> mx.array:
        layer = self.body.layers[number]
        y_BLD = layer.input_layernorm(x_BLD)
        x_BLD = x_BLD + self.attend(layer.self_attn, y_BLD, positions_BL, cache)
        return x_BLD + layer.mlp(layer.post_attention_layernorm(x_BLD))

    def attend(
        self, attention: Any, y_BLD: mx.array, positions_BL: mx.array, cache: Any
    ) -> mx.array:
        """The attention of a normed input, whose keys and values go into the cache."""
        q_BHLd = self.heads(attention, "q", y_BLD, positions_BL)
        v_BGLd = split_heads(attention.v_proj(y_BLD), attention.n_kv_heads)
        k_BGLd = self.heads(attention, "k", y_BLD, positions_BL)
        mask = layer_mask(cache, y_BLD)
        k, v = cache.update_and_fetch(k_BGLd, v_BGLd)
        out = mx.fast.scaled_dot_product_attention(q_BHLd, k, v, scale=attention.scale, mask=mask)
        attended_BLD: mx.array = attention.o_proj(out.swapaxes(1, 2).flatten(2))
        return attended_BLD

    def rotate(self, attention: Any, x_BHLd: mx.array, positions_BL: mx.array) -> mx.array:
        """Each row by itself, as the first of a prompt that starts at its position."""
        (B, H, L, d), rope = x_BHLd.shape, getattr(attention, "rope", None)
        x_NH1d = x_BHLd.swapaxes(1, 2).reshape(B * L, H, 1, d)
        rope = attention.rotary_emb if rope is None else rope  # as InternVL calls it
        x_NH1d = rope(x_NH1d, offset=positions_BL.reshape(-1).astype(mx.int32))
        return x_NH1d.reshape(B, L, H, d).swapaxes(1, 2)


class Gemma3Layers(RopeOffsetLayers):
    """Gemma 3's: a norm behind attention and MLP, too; some layers hold a window of rows."""

    has_window = True

    @property
    def window(self) -> int | None:
        window: int = self.body.window_size
        return window

    def enter(self, x_BLD: mx.array) -> mx.array:
        if not self.body.scale_inputs_embeds:
            return x_BLD
        root = mx.array(self.body.config.hidden_size**0.5, mx.bfloat16)  # rounded, as there
        return x_BLD * root.astype(x_BLD.dtype)

    def block(self, number: int, x_BLD: mx.array, positions_BL: mx.array, cache: Any) -> mx.array:
        from mlx_vlm.models.gemma3.language import clip_residual

        layer = self.body.layers[number]
        x_BLD = clip_residual(x_BLD)
        y_BLD = self.attend(layer.self_attn, layer.input_layernorm(x_BLD), positions_BL, cache)
        x_BLD = clip_residual(x_BLD, layer.post_attention_layernorm(y_BLD))
        y_BLD = layer.mlp(layer.pre_feedforward_layernorm(x_BLD))
        result_BLD: mx.array = clip_residual(x_BLD, layer.post_feedforward_layernorm(y_BLD))
        return result_BLD

    def rotated_queries(self, number: int, x_BLD: mx.array, positions_BL: mx.array) -> mx.array:
        """As long as methods expect, which divide products by the root of d."""
        q_BGRLd = super().rotated_queries(number, x_BLD, positions_BL)
        return q_BGRLd * (self.body.layers[number].self_attn.scale * q_BGRLd.shape[-1] ** 0.5)


class PositionIdLayers(LanguageLayers):
    """Qwen's: the layers take positions along three axes, (B, L, 3)."""

    axes = 3

    def block(self, number: int, x_BLD: mx.array, positions_BL: mx.array, cache: Any) -> mx.array:
        mask = layer_mask(cache, x_BLD)
        layer = self.body.layers[number]
        return layer(x_BLD, mask, cache, positions_BL.transpose(2, 0, 1))

    def rotate(self, attention: Any, x_BHLd: mx.array, positions_BL: mx.array) -> mx.array:
        positions_3BL = positions_BL.transpose(2, 0, 1)
        return attention.rotary_emb.apply_rotary(x_BHLd, x_BHLd, positions_3BL)[0]


def layer_mask(layer_cache: Any, x_BLD: mx.array) -> mx.array | str | None:
    """The mask of a layer for L more rows; one that is added where the cache has biases."""
    mask: Any = layer_cache.make_mask(x_BLD.shape[1], return_array=False, window_size=None)
    return mask.astype(x_BLD.dtype) if isinstance(layer_cache, BiasedCache) else mask


class ShiftedCache:
    """A cache whose next row stands `shift` positions after the number of its rows."""

    def __init__(self, cache: Any, shift: int):
        self.cache, self.shift = cache, shift

    @property
    def offset(self) -> int:
        return self.cache.offset + self.shift

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # while it is copied there is no cache yet
            raise AttributeError(name)
        value = getattr(self.cache, name)
        if name == "to_quantized":  # mlx-vlm replaces every cache that has this method
            return lambda **options: ShiftedCache(value(**options), self.shift)
        return value


def split_heads(x_ISD: mx.array, heads: int) -> mx.array:
    """(I, S, D) to (I, H, S, d)."""
    return x_ISD.reshape(*x_ISD.shape[:2], heads, -1).swapaxes(1, 2)


def masked_logits(
    language: Any, ids_1L: mx.array, x_1LD: mx.array, mask_11LL: mx.array, **positions: Any
) -> mx.array:
    """Logits (1, L, V) of a language model without a cache, under a mask that is added to the
    attention in all layers: some language models themselves leave a mask out."""
    x_1LD = language.model(ids_1L, inputs_embeds=x_1LD, mask=mask_11LL, **positions)
    settings = language.args if hasattr(language, "args") else language.config
    is_tied = settings.tie_word_embeddings
    head = language.model.embed_tokens.as_linear if is_tied else language.lm_head
    logits_1LV: mx.array = head(x_1LD)
    return logits_1LV
