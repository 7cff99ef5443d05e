"""Qwen2.5-VL: most layers of the tower see windows only, and patches are gathered by them.

Shapes: S patches of all images, U = S / m^2 visual tokens, a angles.
"""

import mlx.core as mx
import numpy as np

from ..prepared_inputs import PreparedInputs
from .qwen2_vl import Qwen2VLHost, Row


class Qwen2_5VLHost(Qwen2VLHost):
    def pack(self, inputs: PreparedInputs) -> Row:
        row, tower = super().pack(inputs), self.tower
        order_U, ends = tower.get_window_index(inputs.extra["image_grid_thw"])
        windows = mx.array(np.unique(np.array(ends)), mx.int32)  # empty windows are listed, too

        def gathered(x_Sa: mx.array) -> mx.array:
            return x_Sa.reshape(len(order_U), -1, x_Sa.shape[-1])[order_U].reshape(x_Sa.shape)

        def bounds(layer: int) -> mx.array:
            return row.bounds(layer) if layer in tower.fullatt_block_indexes else windows

        return Row(gathered(row.x_SD), gathered(row.angles_Sa), bounds, np.array(order_U))
