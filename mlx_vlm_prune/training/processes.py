"""The processes that train together, as `mlx.launch` starts them; mostly one.

Each reads its share of every batch. What they sum is the same, bit for bit, in all of them, so
that their weights stay the same.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.utils import average_gradients
from mlx.utils import tree_map

from ..checkpoints.errors import UserError


class LocalFault(UserError):
    """A mistake that only this process has met; the others cannot say it."""


class Processes:
    """The group that `mx.distributed.init()` finds."""

    def __init__(self) -> None:
        self.group = mx.distributed.init()
        self.rank, self.size = self.group.rank(), self.group.size()

    @property
    def is_first(self) -> bool:
        """It alone writes and prints."""
        return self.rank == 0

    def share(self, numbers: np.ndarray) -> np.ndarray:
        """This process's part of some numbers."""
        return numbers[self.rank :: self.size]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Of each value over all processes."""
        if self.size == 1:
            return list(values)
        total = mx.distributed.all_sum(mx.array(list(values), mx.float32), group=self.group)
        return np.array(total, np.float64).tolist()

    def sum_slopes(self, slopes: Any) -> Any:
        """Of gradients over all processes."""
        if self.size == 1:
            return slopes
        mean = average_gradients(slopes, self.group)
        return tree_map(lambda slope: slope * self.size, mean)

    def union(self, numbers: Iterable[int], below: int) -> set[int]:
        """Of sets of numbers below a bound."""
        if self.size == 1:
            return set(numbers)
        is_in = np.zeros(below, np.int32)
        is_in[list(numbers)] = 1
        counts = mx.distributed.all_sum(mx.array(is_in), group=self.group)
        return set(np.flatnonzero(np.array(counts)).tolist())

    def agree(self, fault: UserError | None) -> None:
        """Raise what this process has met, or end silently where another has met something."""
        faults = self.sum([float(fault is not None)])[0]
        if fault is not None:
            raise fault if self.size == 1 else LocalFault(str(fault)) from None
        if faults:
            raise SystemExit(2)
