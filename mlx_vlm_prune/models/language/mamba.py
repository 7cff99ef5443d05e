"""Layers of a selective state space, Mamba (arXiv:2312.00752), below pruned rows.

A layer reads its rows in their order, and remembers them in a state of fixed size. There is no
attention, and there are no positions: kept or counted, they are the same. A row that leaves
between two layers is read by no later one, so that the states of those never hear of it; what
a method can save is reading, not memory.

Shapes: B prompts, L new rows, l of them real, D features.
"""

import copy
from typing import Any

import mlx.core as mx

from ..cache import PADDING


class State:
    """What one layer remembers: of all prompts together, or of each apart where some are padded."""

    def __init__(self) -> None:
        self.held: list[Any] = []
        self.rows = 0  # that were read, padding among them
        self.padded = False  # is any of them padding?

    def fork(self) -> "State":
        """The same; what is read on top of one of both is not in the other."""
        fork = copy.copy(self)
        fork.held = [copy.copy(one) for one in self.held]
        for one in fork.held:
            one.cache = [part if part is None else mx.array(part) for part in one.cache]
        return fork

    def of(self, number: int) -> Any:
        """mlx-lm's own cache of a layer: what the convolution and the scan go on from."""
        from mlx_lm.models.cache import ArraysCache

        while len(self.held) <= number:
            self.held.append(ArraysCache(size=2))
        return self.held[number]

    @property
    def nbytes(self) -> int:
        """Bytes of the states, however many rows were read."""
        return sum(part.nbytes for one in self.held for part in (one[0], one[1]))


def block(layer: Any, x_BLD: mx.array, step: Any, state: State) -> mx.array:
    """One layer. A state cannot be masked, so padding is not read: prompts go one by one."""
    L = x_BLD.shape[1]
    state.rows, state.padded = state.rows + L, state.padded or step.padded
    if not state.padded:
        y_BLD = layer.part(x_BLD, state.of(0))
    else:
        parts = []
        for b, real in enumerate((step.positions_BL != PADDING).sum(axis=1).tolist()):
            x_1lD = x_BLD[b : b + 1, L - real :]
            y_1lD = layer.part(x_1lD, state.of(b)) if real else x_1lD
            parts.append(mx.pad(y_1lD, [(0, 0), (L - real, 0), (0, 0)]))
        y_BLD = mx.concatenate(parts)
    mx.eval(y_BLD)  # mlx-lm scans row by row: the graph of all layers would be long
    return y_BLD
