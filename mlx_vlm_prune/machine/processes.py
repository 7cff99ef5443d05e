"""The processes that share a work, as `mlx.launch` starts them; mostly one.

What they sum or gather is the same, bit for bit, in all of them.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from .agreement import Agreement


class ProcessGroup(Agreement):
    """The group that `mx.distributed.init()` finds."""

    def __init__(self) -> None:
        self.group = mx.distributed.init()
        self.rank, self.size = self.group.rank(), self.group.size()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Of each value over all processes."""
        if self.size == 1:
            return list(values)
        total = mx.distributed.all_sum(mx.array(list(values), mx.float32), group=self.group)
        return np.array(total, np.float64).tolist()

    def gather(self, text: str) -> list[str]:
        """The text of each process, by its rank."""
        if self.size == 1:
            return [text]
        data = np.frombuffer(text.encode(), np.uint8)
        lengths = mx.distributed.all_gather(mx.array([len(data)]), group=self.group)
        padded = np.zeros(max(1, np.array(lengths).max()), np.uint8)
        padded[: len(data)] = data
        rows = np.array(mx.distributed.all_gather(mx.array(padded), group=self.group))
        pairs = zip(rows.reshape(self.size, -1), np.array(lengths), strict=True)
        return [row[:length].tobytes().decode() for row, length in pairs]
