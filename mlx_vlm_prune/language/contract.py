"""What the model asks of a language model, whoever computes its layers.

Shapes: B prompts, L rows, D features, V words, H heads, G key/value heads, d head size.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
from mlx import nn

from ..pruners.pipeline import Pipeline


class Attention(Protocol):
    """One layer's attention, part by part; `rotary` is what the language model makes of
    positions."""

    def grouped_queries(self, x_BLD: mx.array, rotary: Any) -> mx.array:
        """Turned queries as the keys are grouped, (B, G, H/G, L, d)."""
        ...

    def turned_keys(self, x_BLD: mx.array, rotary: Any) -> mx.array:
        """(B, G, L, d)."""
        ...


class Layer(Protocol):
    @property
    def self_attn(self) -> Attention: ...
    @property
    def input_layernorm(self) -> nn.Module: ...


class Language(Protocol):
    """Embeddings with positions to logits, layer by layer."""

    @property
    def layers(self) -> Sequence[Any]: ...
    @property
    def norm(self) -> nn.Module: ...

    def embed_tokens(self, ids: mx.array) -> mx.array: ...

    def check(self, pipeline: Pipeline) -> None:
        """UserError, by name and with the reason, for a method that cannot work here."""
        ...

    def make_cache(self) -> list[Any]: ...

    def rotary(self, positions_BL: mx.array) -> Any: ...

    def run(
        self, numbers: range, x_BLD: mx.array, positions_BL: mx.array, cache: list[Any],
        *, padded: bool = False, bias_BL: mx.array | None = None,
    ) -> mx.array:  # fmt: skip
        """Hidden states through some of the layers, whose caches grow by L rows."""
        ...

    def logits(self, x_BLD: mx.array) -> mx.array: ...
