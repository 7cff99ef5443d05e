"""What the decoder asks of a language model, whoever computes its layers.

Shapes: B prompts, L rows, S rows held, D features, V words, G key/value heads, R queries of each,
d head size. Positions are (B, L), or (B, L, A) of a model that counts along A axes.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx


class Layers(Protocol):
    """Layers that are driven one by one: a language model's, or a twig's."""

    def make_cache(self) -> list[Any]: ...

    def run(
        self, numbers: range, x_BLD: mx.array, positions_BL: mx.array, cache: list[Any],
        *, contiguous: bool = False, padding: Sequence[int] = (), bias_BL: mx.array | None = None,
    ) -> mx.array:  # fmt: skip
        """Hidden states through some of the layers, whose caches grow by L rows.

        `contiguous` says that each prompt's positions count up one by one, `padding`
        how many of each prompt's rows are padding, at position PADDING, on the left; empty, none.
        """
        ...

    def rotated_queries(self, number: int, x_BLD: mx.array, positions_BL: mx.array) -> mx.array:
        """The queries (B, G, R, L, d) that a layer makes of its input, rotated."""
        ...

    def rotated_keys(self, number: int, x_BLD: mx.array, positions_BL: mx.array) -> mx.array:
        """The keys (B, G, L, d) that a layer makes of its input, rotated."""
        ...


class Language(Layers, Protocol):
    """All layers of a language model, and the norm behind them."""

    @property
    def depth(self) -> int:
        """How many layers there are."""
        ...

    def held_keys(self, layer_cache: Any) -> mx.array:
        """The keys (B, G, S, d) of all rows that a layer holds."""
        ...

    def held_values(self, layer_cache: Any) -> mx.array:
        """The values (B, G, S, d) of the same rows."""
        ...

    def mean_rotation(self, number: int, positions_BL: mx.array) -> tuple[mx.array, mx.array]:
        """The means of the cosines and of the sines by which a layer rotates rows at positions,
        over frequencies and over axes, (B, L) each; a factor common to all of them may be left."""
        ...

    def norm(self, x_BLD: mx.array) -> mx.array:
        """The last norm, ahead of the output layer."""
        ...
