"""Gradient checkpointing: layers are computed again in the backward pass.

So memory holds what stands between them, and the inside of one.
"""

from copy import copy
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn

from ..checkpoints.errors import UserError
from ..models.language.minimind import LayerStack
from .learner import Learner


def recompute_layers(learner: Learner) -> None:
    """From here on, in training, every language model's and twig's layers of a learner.

    Raises UserError behind a method that reads what layers hold: their caches stay empty.
    """
    if step := learner.pipeline.decoder:
        raise UserError(
            f"grad_checkpoint cannot be used with {step.name}, which drops tokens between the"
            " language model's layers by what these hold"
        )
    for module in learner.modules():
        if isinstance(module, LayerStack):
            kind = type(module)
            # Only this instance's class, not what others make of it.
            module.__class__ = type(kind.__name__, (RecomputedLayers, kind), {})


class RecomputedLayers:
    """Beside a LayerStack: each layer is a checkpoint with a cache of its own."""

    def run(
        self: Any, numbers: range, x_BLD: mx.array, positions_BL: mx.array, cache: list[Any],
        *, bias_BL: mx.array | None = None, **options: Any,
    ) -> mx.array:  # fmt: skip
        """As `LayerStack.run`; caches are filled only where nothing is trained."""
        run = super().run  # type: ignore[misc]  # LayerStack's, of a mixin
        if not self.training:
            result: mx.array = run(numbers, x_BLD, positions_BL, cache, bias_BL=bias_BL, **options)
            return result
        for number in numbers:
            assert not vars(cache[number]).get("begun"), "gradients need all rows at once"
            cache[number].begun = True
            module = getattr(self.layers[number], "wrapped", self.layers[number])
            layer = partial(run, positions_BL=positions_BL, **options)
            x_BLD = self._checkpointed(number, module, layer, copy(cache[number]))(
                module.trainable_parameters(), x_BLD, [] if bias_BL is None else [bias_BL]
            )
        return x_BLD

    def _checkpointed(self: Any, number: int, module: nn.Module, run: Any, empty: Any) -> Any:
        """A layer as a function of all that gradients may go to: its weights, rows and biases.

        Computed again, it draws the random numbers of the first time.
        """
        drops = any(isinstance(m, nn.Dropout) and m._p_1 < 1 for m in module.modules())
        begin = random_state() if drops else 0

        def layer(parameters: Any, x_BLD: mx.array, biases: list[mx.array]) -> mx.array:
            before, now = module.trainable_parameters(), random_state() if drops else 0
            module.update(parameters)
            if drops:
                mx.random.seed(begin)
            fresh = {number: copy(empty)}
            bias_BL = biases[0] if biases else None
            rows = range(number, number + 1)
            result: mx.array = run(rows, x_BLD, cache=fresh, bias_BL=bias_BL)
            module.update(before)
            if now != begin:  # computed again
                mx.random.seed(now)
            return result

        return mx.checkpoint(layer)


def random_state() -> int:
    """The seed with which MLX would draw the same numbers as from here on."""
    state: Any = mx.random.state
    high, low = state[0].tolist()
    return int(high) << 32 | int(low)
