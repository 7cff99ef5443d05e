"""The processes that train together: each reads its share of every batch.

They sum their gradients, so that their weights stay the same.
"""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.utils import average_gradients
from mlx.utils import tree_map

from ..machine.processes import ProcessGroup


class Processes(ProcessGroup):
    """As `mlx.launch` starts them."""

    def share(self, numbers: np.ndarray) -> np.ndarray:
        """This process's part of some numbers."""
        return numbers[self.rank :: self.size]

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
