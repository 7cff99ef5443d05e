"""Layers of a selective state space, Mamba (arXiv:2312.00752), below pruned rows.

A layer reads its rows in order into a state of fixed size. There is no attention, and there are
no positions: `keep` and `renumber` are the same. A row that leaves between two layers is not in
the states of later ones. So a method saves operations, not memory.

Shapes: B prompts, L new rows, l of them real, D features.
"""

import copy
from typing import Any

import mlx.core as mx


class MambaState:
    """A layer's state: of all prompts together, or of each apart where some are padded."""

    def __init__(self) -> None:
        self.caches: list[Any] = []
        self.rows = 0  # read so far, with padding
        self.padded = False  # is any of them padding?

    def fork(self) -> "MambaState":
        """A copy; what either reads later is not in the other."""
        fork = copy.copy(self)
        fork.caches = [copy.copy(cache) for cache in self.caches]
        for cache in fork.caches:
            cache.cache = [x if x is None else mx.array(x) for x in cache.cache]
        return fork

    def cache_of(self, number: int) -> Any:
        """mlx-lm's own cache of a layer: what the convolution and the scan go on from."""
        from mlx_lm.models.cache import ArraysCache

        while len(self.caches) <= number:
            self.caches.append(ArraysCache(size=2))
        return self.caches[number]

    @property
    def nbytes(self) -> int:
        """Bytes of the states, however many rows were read."""
        return sum(x.nbytes for cache in self.caches for x in (cache[0], cache[1]))


def block(layer: Any, x_BLD: mx.array, forward_pass: Any, state: MambaState) -> mx.array:
    """One layer. A state cannot be masked, so padded prompts are read one by one."""
    L = x_BLD.shape[1]
    state.rows, state.padded = state.rows + L, state.padded or forward_pass.padded
    if not state.padded:
        y_BLD = layer.wrapped(x_BLD, state.cache_of(0))
    else:
        parts = []
        for b in range(len(x_BLD)):
            real = L - min(L, forward_pass.padding[b]) if forward_pass.padding else L
            x_1lD = x_BLD[b : b + 1, L - real :]
            y_1lD = layer.wrapped(x_1lD, state.cache_of(b)) if real else x_1lD
            parts.append(mx.pad(y_1lD, [(0, 0), (L - real, 0), (0, 0)]))
        y_BLD = mx.concatenate(parts)
    if not layer.wrapped.training:  # whose gradients need the graph
        mx.async_eval(y_BLD)  # mlx-lm scans row by row: the graph of all layers would be long
    return y_BLD
