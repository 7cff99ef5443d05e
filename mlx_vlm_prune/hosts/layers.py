"""A language model's layers one by one, each row at a position of its own.

Qwen's layers take positions. Llama's count: rotation starts at the cache's offset. Rows with gaps
between them are rotated as if each were a prompt of one row, which may start anywhere; and a cache
with fewer rows than came before says by how many it is `Ahead`.

Shapes: L rows, S rows held, D features, A axes of a position (1 or 3), G key/value heads, R queries
of each, d head size.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import mlx.core as mx


class Layers(ABC):
    """The layers of a host's language model, called by their numbers; positions are (A, L)."""

    axes: ClassVar[int]

    def __init__(self, body: Any):
        self.body = body

    def __len__(self) -> int:
        return len(self.body.layers)

    @property
    def norm(self) -> Any:
        """The norm behind the last layer."""
        return self.body.norm

    @abstractmethod
    def run(self, number: int, x_1LD: mx.array, place_AL: mx.array, cache: Any) -> mx.array:
        """The rows (1, L, D) behind a layer, whose cache grows by them."""

    @abstractmethod
    def queries(self, number: int, x_1LD: mx.array, place_AL: mx.array) -> mx.array:
        """A layer's rotated queries, as its keys are grouped, (1, G, R, L, d)."""

    @abstractmethod
    def keys(self, number: int, x_1LD: mx.array, place_AL: mx.array) -> mx.array:
        """A layer's rotated keys, (1, G, L, d)."""


class CountingLayers(Layers):
    """Llama's: rows are rotated here, since the layers would count them."""

    axes = 1

    def run(self, number: int, x_1LD: mx.array, place_AL: mx.array, cache: Any) -> mx.array:
        layer = self.body.layers[number]
        attention, y_1LD = layer.self_attn, layer.input_layernorm(x_1LD)
        q_1HLd = _rotated(
            attention.rope, split(attention.q_proj(y_1LD), attention.n_heads), place_AL
        )
        k_1GLd = _rotated(
            attention.rope, split(attention.k_proj(y_1LD), attention.n_kv_heads), place_AL
        )
        v_1GLd = split(attention.v_proj(y_1LD), attention.n_kv_heads)
        k, v = cache.update_and_fetch(k_1GLd, v_1GLd)
        out = mx.fast.scaled_dot_product_attention(
            q_1HLd, k, v, scale=attention.scale, mask="causal"
        )
        x_1LD = x_1LD + attention.o_proj(out.swapaxes(1, 2).flatten(2))
        return x_1LD + layer.mlp(layer.post_attention_layernorm(x_1LD))

    def queries(self, number: int, x_1LD: mx.array, place_AL: mx.array) -> mx.array:
        layer = self.body.layers[number]
        attention, y_1LD = layer.self_attn, layer.input_layernorm(x_1LD)
        q_1HLd = split(attention.q_proj(y_1LD), attention.n_heads)
        return _grouped(attention, _rotated(attention.rope, q_1HLd, place_AL))

    def keys(self, number: int, x_1LD: mx.array, place_AL: mx.array) -> mx.array:
        layer = self.body.layers[number]
        attention, y_1LD = layer.self_attn, layer.input_layernorm(x_1LD)
        k_1GLd = split(attention.k_proj(y_1LD), attention.n_kv_heads)
        return _rotated(attention.rope, k_1GLd, place_AL)


class PlacedLayers(Layers):
    """Qwen's: the layers take positions of three axes."""

    axes = 3

    def run(self, number: int, x_1LD: mx.array, place_AL: mx.array, cache: Any) -> mx.array:
        mask = cache.make_mask(x_1LD.shape[1], return_array=False, window_size=None)
        return self.body.layers[number](x_1LD, mask, cache, place_AL[:, None])

    def queries(self, number: int, x_1LD: mx.array, place_AL: mx.array) -> mx.array:
        layer = self.body.layers[number]
        attention, y_1LD = layer.self_attn, layer.input_layernorm(x_1LD)
        q_1HLd = _normed(attention, "q", split(attention.q_proj(y_1LD), attention.n_heads))
        rotate = attention.rotary_emb.apply_rotary
        return _grouped(attention, rotate(q_1HLd, q_1HLd, place_AL[:, None])[0])

    def keys(self, number: int, x_1LD: mx.array, place_AL: mx.array) -> mx.array:
        layer = self.body.layers[number]
        attention, y_1LD = layer.self_attn, layer.input_layernorm(x_1LD)
        k_1GLd = _normed(attention, "k", split(attention.k_proj(y_1LD), attention.n_kv_heads))
        return attention.rotary_emb.apply_rotary(k_1GLd, k_1GLd, place_AL[:, None])[1]


class Ahead:
    """A cache whose next row stands `by` places further than it has rows."""

    def __init__(self, cache: Any, by: int):
        self.cache, self.by = cache, by

    @property
    def offset(self) -> int:
        return self.cache.offset + self.by

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.cache, name)
        if name == "to_quantized":  # which mlx-vlm asks of every cache that has it
            return lambda **options: Ahead(value(**options), self.by)
        return value


def split(x_ISD: mx.array, heads: int) -> mx.array:
    """(I, S, D) as (I, H, S, d)."""
    return x_ISD.reshape(*x_ISD.shape[:2], heads, -1).swapaxes(1, 2)


def _rotated(rope: Any, x_1HLd: mx.array, place_1L: mx.array) -> mx.array:
    """Every row by itself, as the first of a prompt that starts where it stands."""
    x_LH1d = x_1HLd.transpose(2, 1, 0, 3)
    return rope(x_LH1d, offset=place_1L[0].astype(mx.int32)).transpose(2, 1, 0, 3)


def _grouped(attention: Any, q_1HLd: mx.array) -> mx.array:
    return q_1HLd.reshape(1, attention.n_kv_heads, -1, *q_1HLd.shape[2:])


def _normed(attention: Any, which: str, x_1HLd: mx.array) -> mx.array:
    """Qwen3 norms each head; it may do so with the heads ahead of the rows, too."""
    norm = getattr(attention, f"{which}_norm", None)
    return x_1HLd if norm is None else norm(x_1HLd)
