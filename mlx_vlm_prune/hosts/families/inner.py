"""A language model's layers one by one, each row at a place of its own.

Qwen's layers are told where rows stand. Llama's count: rotation starts at the cache's offset. Rows
with gaps between them are rotated as if each were a prompt of one row, which may start anywhere;
and a cache with fewer rows than came before says by how many it is `Ahead`.

Shapes: L rows, S rows held, D features, A axes of a position (1 or 3), G key/value heads, R queries
of each, d head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .common import split


@dataclass(frozen=True)
class Inner:
    """How the layers of a family are driven; places are (A, L)."""

    axes: int
    run: Callable[[Any, mx.array, mx.array, Any], mx.array]  # layer, x (1, L, D), places, cache
    queries: Callable[[Any, mx.array, mx.array], mx.array]  # (1, G, R, L, d), turned
    keys: Callable[[Any, mx.array, mx.array], mx.array]  # (1, G, L, d), turned


class Ahead:
    """A cache whose next row stands `by` places further than it has rows."""

    def __init__(self, cache: Any, by: int):
        self.cache, self.by = cache, by

    @property
    def offset(self) -> int:
        return self.cache.offset + self.by

    def __getattr__(self, name: str) -> Any:
        own = getattr(self.cache, name)
        if name == "to_quantized":  # which mlx-vlm asks of every cache that has it
            return lambda **told: Ahead(own(**told), self.by)
        return own


def _counting_run(layer: Any, x_1LD: mx.array, place_1L: mx.array, cache: Any) -> mx.array:
    own, y_1LD = layer.self_attn, layer.input_layernorm(x_1LD)
    q_1HLd = _turned(own.rope, split(own.q_proj(y_1LD), own.n_heads), place_1L)
    k_1GLd = _turned(own.rope, split(own.k_proj(y_1LD), own.n_kv_heads), place_1L)
    k, v = cache.update_and_fetch(k_1GLd, split(own.v_proj(y_1LD), own.n_kv_heads))
    out = mx.fast.scaled_dot_product_attention(q_1HLd, k, v, scale=own.scale, mask="causal")
    x_1LD = x_1LD + own.o_proj(out.swapaxes(1, 2).flatten(2))
    return x_1LD + layer.mlp(layer.post_attention_layernorm(x_1LD))


def _counting_queries(layer: Any, x_1LD: mx.array, place_1L: mx.array) -> mx.array:
    own = layer.self_attn
    q_1HLd = split(own.q_proj(layer.input_layernorm(x_1LD)), own.n_heads)
    return _grouped(own, _turned(own.rope, q_1HLd, place_1L))


def _counting_keys(layer: Any, x_1LD: mx.array, place_1L: mx.array) -> mx.array:
    own = layer.self_attn
    k_1GLd = split(own.k_proj(layer.input_layernorm(x_1LD)), own.n_kv_heads)
    return _turned(own.rope, k_1GLd, place_1L)


def _turned(rope: Any, x_1HLd: mx.array, place_1L: mx.array) -> mx.array:
    """Every row by itself, as the first of a prompt that starts where it stands."""
    x_LH1d = x_1HLd.transpose(2, 1, 0, 3)
    return rope(x_LH1d, offset=place_1L[0].astype(mx.int32)).transpose(2, 1, 0, 3)


def _grouped(own: Any, q_1HLd: mx.array) -> mx.array:
    return q_1HLd.reshape(1, own.n_kv_heads, -1, *q_1HLd.shape[2:])


def _told_run(layer: Any, x_1LD: mx.array, place_3L: mx.array, cache: Any) -> mx.array:
    mask = cache.make_mask(x_1LD.shape[1], return_array=False, window_size=None)
    return layer(x_1LD, mask, cache, place_3L[:, None])


def _told_queries(layer: Any, x_1LD: mx.array, place_3L: mx.array) -> mx.array:
    own = layer.self_attn
    q_1HLd = _normed(own, "q", split(own.q_proj(layer.input_layernorm(x_1LD)), own.n_heads))
    return _grouped(own, own.rotary_emb.apply_rotary(q_1HLd, q_1HLd, place_3L[:, None])[0])


def _told_keys(layer: Any, x_1LD: mx.array, place_3L: mx.array) -> mx.array:
    own = layer.self_attn
    k_1GLd = _normed(own, "k", split(own.k_proj(layer.input_layernorm(x_1LD)), own.n_kv_heads))
    return own.rotary_emb.apply_rotary(k_1GLd, k_1GLd, place_3L[:, None])[1]


def _normed(own: Any, which: str, x_1HLd: mx.array) -> mx.array:
    """Qwen3 norms each head; it may do so with the heads ahead of the rows, too."""
    norm = getattr(own, f"{which}_norm", None)
    return x_1HLd if norm is None else norm(x_1HLd)


counting = Inner(1, _counting_run, _counting_queries, _counting_keys)
told = Inner(3, _told_run, _told_queries, _told_keys)
