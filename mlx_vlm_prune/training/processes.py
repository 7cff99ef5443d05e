"""The processes that train together: each reads its share of every batch.

They sum their gradients, so that their weights stay the same.
"""

from typing import Any

from mlx.nn.utils import average_gradients
from mlx.utils import tree_map

from ..machine.processes import ProcessGroup


class Processes(ProcessGroup):
    """As `mlx.launch` starts them."""

    def sum_gradients(self, gradients: Any) -> Any:
        """Over all processes."""
        if self.size == 1:
            return gradients
        mean = average_gradients(gradients, self.group)
        return tree_map(lambda gradient: gradient * self.size, mean)
