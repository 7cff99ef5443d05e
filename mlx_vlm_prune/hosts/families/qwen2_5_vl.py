"""Qwen2.5-VL: most layers of the tower attend within windows, and patches are ordered by them.

Shapes: S patches of all images, U = S / m^2 visual tokens, a angles.
"""

import mlx.core as mx
import numpy as np

from ..prepared_inputs import PreparedInputs
from .packed_patches import PackedPatches
from .qwen2_vl import Qwen2VLHost


class Qwen2_5VLHost(Qwen2VLHost):
    @property
    def feature_dims(self) -> int:
        dims: int = self.model.config.vision_config.out_hidden_size
        return dims

    def pack_patches(self, inputs: PreparedInputs) -> PackedPatches:
        packed, tower = super().pack_patches(inputs), self.tower
        order_U, ends = tower.get_window_index(inputs.grids_I3)
        windows = mx.array(np.unique(np.array(ends)), mx.int32)  # empty windows are listed, too

        def in_tower_order(x_Sa: mx.array) -> mx.array:
            return x_Sa.reshape(len(order_U), -1, x_Sa.shape[-1])[order_U].reshape(x_Sa.shape)

        def bounds(layer: int) -> mx.array:
            return packed.bounds(layer) if layer in tower.fullatt_block_indexes else windows

        return PackedPatches(
            in_tower_order(packed.x_SD), in_tower_order(packed.angles_Sa), bounds, np.array(order_U)
        )
