"""Qwen2-VL: every layer of the tower sees the whole image."""

import numpy as np

from ..views import Inputs
from .qwen import QwenHost, Row


class Qwen2VLHost(QwenHost):
    def pack(self, inputs: Inputs) -> Row:
        x_SD, angles_Sa, ends = self.patches(inputs)
        order_U = np.arange(len(x_SD) // self.tower.spatial_merge_size**2)
        return Row(x_SD, angles_Sa, lambda _: ends, order_U)
