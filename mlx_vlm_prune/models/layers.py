"""The rows of prompts through some layers of a language model or of a twig.

Shapes: B prompts, L rows, D features, G key/value heads, S rows held, d head size.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from .language.contract import Layers
from .language.twig import Twig
from .splice import Spliced

PREFILL_STEP_SIZE = 2048  # rows of a prompt read at once
Observers = Mapping[int, Callable[[Spliced], object]]  # by layer


def run_layers(
    language: Layers, numbers: range, spliced: Spliced, cache: list[Any],
    prefill_step_size: int | None = None,
) -> mx.array:  # fmt: skip
    """Hidden states after some layers.

    A long prompt is read in chunks, each computed in turn: memory must not grow with its square.
    """
    if not numbers:
        return spliced.x_BLD
    if spliced.first_bias_BL is not None and 0 in numbers:
        first = replace(spliced, bias_BL=spliced.first_bias_BL, first_bias_BL=None)
        x_BLD = run_layers(language, numbers[:1], first, cache, prefill_step_size)
        numbers, spliced = numbers[1:], replace(spliced, x_BLD=x_BLD, first_bias_BL=None)
        return run_layers(language, numbers, spliced, cache, prefill_step_size)
    chunks, size = [], prefill_step_size or PREFILL_STEP_SIZE
    for begin in range(0, spliced.L, size):
        rows = slice(begin, begin + size)
        x_BLD, positions_BL = spliced.x_BLD[:, rows], spliced.positions_BL[:, rows]
        options = row_options(spliced, rows)
        chunks.append(language.run(numbers, x_BLD, positions_BL, cache, **options))
        if size < spliced.L:
            mx.async_eval(chunks[-1])
    return mx.concatenate(chunks, axis=1) if len(chunks) > 1 else chunks[0]


def row_options(spliced: Spliced, rows: slice = slice(0, None)) -> dict[str, Any]:
    """What is known of some rows beside their positions."""
    padding = [max(0, n - rows.start) for n in spliced.padding]
    bias_BL = None if spliced.bias_BL is None else spliced.bias_BL[:, rows]
    return {"contiguous": spliced.contiguous, "padding": padding, "bias_BL": bias_BL}


class TwigReader:
    """A twig with its cache of one request."""

    def __init__(self, twig: Twig):
        self.twig, self.cache = twig, twig.make_cache()
        self.last = len(twig.layers) - 1
        self._last_input_BLD: mx.array | None = None

    def last_input(self, spliced: Spliced) -> mx.array:
        """The input (B, L, D) of its last layer; the layers below run once."""
        if self._last_input_BLD is None:
            self._last_input_BLD = run_layers(self.twig, range(self.last), spliced, self.cache)
        return self._last_input_BLD

    def read(self, spliced: Spliced) -> None:
        """Read the prompts as they are at its layer.

        Nothing reads the last layer's output, so MLX computes its keys and values and nothing else.
        """
        numbers, x_BLD = range(self.last, self.last + 1), self.last_input(spliced)
        self.twig.run(numbers, x_BLD, spliced.positions_BL, self.cache, **row_options(spliced))
        last = self.cache[self.last]
        mx.async_eval(last.keys_BGSd, last.values_BGSd)

    @property
    def observers(self) -> Observers:
        """It reads the input of the layer that it grows on."""
        return {self.twig.layer: self.read}


def attention(
    q_BGRQd: mx.array, k_BGSd: mx.array, visible_BQS: mx.array, bias_BS: mx.array | None
) -> mx.array:
    """What Q queries attend to, mean over heads, (B, Q, S) float32."""
    logits = (q_BGRQd @ k_BGSd[:, :, None].swapaxes(3, 4)).astype(mx.float32)
    logits = logits * k_BGSd.shape[-1] ** -0.5
    if bias_BS is not None:
        logits = logits + bias_BS[:, None, None, None]
    logits = mx.where(visible_BQS[:, None, None], logits, -mx.inf)
    return mx.softmax(logits, axis=-1).mean(axis=(1, 2))
