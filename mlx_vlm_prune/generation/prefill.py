"""`Prefill`: what a model that has read its prompts hands to the token loop.

Shapes: B prompts, L new tokens, V words.
"""

from typing import Protocol

import mlx.core as mx

from ..pruners.trace import Trace


class Prefill(Protocol):
    """Prompts that were read, and the model behind them."""

    @property
    def logits_BV(self) -> mx.array:
        """Of the first new token."""
        ...

    @property
    def rows(self) -> list[int]:
        """Rows that the language model's first layer read, of each prompt."""
        ...

    @property
    def trace(self) -> Trace:
        """What was left of the images."""
        ...

    def step(self, token_BL: mx.array) -> mx.array:
        """Read more tokens; logits (B, L, V) after each of them."""
        ...

    def fork(self) -> "Prefill":
        """The same, whose steps leave this one as it is."""
        ...
