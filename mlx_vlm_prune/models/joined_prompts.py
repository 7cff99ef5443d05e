"""Prompts that were read apart, whose answers go on together: a step is a token of each.

Shapes: B prompts, V words.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..pruners.trace import Trace
from .vlm import Prefill


class JoinedPrompts:
    """A batch that prompts join and leave between two tokens.

    Prompts may hold different numbers of rows, and so may their layers. What a prompt computes does
    not depend on the others, but for the last bits of sums.
    """

    def __init__(self) -> None:
        self.batch: Prefill | None = None

    def __len__(self) -> int:
        return 0 if self.batch is None else len(self.batch.next_B1)

    @property
    def row_bytes(self) -> int:
        """Bytes of a prompt's row in all layers, which have rows."""
        assert self.batch is not None, "a prompt was added"
        return sum(layer.nbytes // (len(self) * layer.rows) for layer in self.batch.cache)

    def add(self, prefill: Prefill) -> None:
        """One more prompt, which becomes the last of the batch; `prefill` stays as it is."""
        parts = [prefill] if self.batch is None else [self.batch, prefill]
        self.batch = _state(
            prefill,
            mx.concatenate([part.next_B1 for part in parts]),
            _by_layer(type(prefill.cache[0]).joined, [part.cache for part in parts]),
        )

    def step(self, token_B1: mx.array) -> mx.array:
        """Read a token of each prompt; logits (B, V) of the next."""
        assert self.batch is not None, "a prompt was added"
        return self.batch.step(token_B1)[:, -1]

    def keep(self, prompts: Sequence[int]) -> None:
        """Forget all but these prompts."""
        if self.batch is None or not prompts:
            self.batch = None
            return
        next_B1 = self.batch.next_B1[mx.array(list(prompts))]
        self.batch = _state(self.batch, next_B1, self.rows_of(prompts))

    def rows_of(self, prompts: Sequence[int]) -> list[Any]:
        """The layers' caches of some prompts, as copies."""
        assert self.batch is not None, "a prompt was added"
        shared: dict[tuple[int, ...], Any] = {}
        return [layer.of_prompts(prompts, shared) for layer in self.batch.cache]


def _state(prefill: Prefill, next_B1: mx.array, cache: list[Any]) -> Prefill:
    """All that a step reads: the language model, positions and caches. The other fields, which are
    figures of one prompt, are empty or the last prompt's."""
    return Prefill(prefill.language, prefill.logits_BLV, next_B1, cache, [], Trace([], [], []))


def _by_layer(join: Any, caches: Sequence[list[Any]]) -> list[Any]:
    """One cache a layer, of the caches of several batches."""
    shared: dict[tuple[int, ...], Any] = {}
    return [join(layers, shared) for layers in zip(*caches, strict=True)]
