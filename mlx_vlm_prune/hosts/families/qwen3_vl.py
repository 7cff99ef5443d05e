"""Qwen3-VL: learned positions beside the rotation, and DeepStack: features of inner layers that
the language model's first layers add to the visual rows.
"""

from collections.abc import Callable, Mapping

import mlx.core as mx
import numpy as np

from ..views import Inputs
from .qwen import QwenHost, Row


class Qwen3VLHost(QwenHost):
    def pack(self, inputs: Inputs) -> Row:
        tower = self.tower
        x_SD, angles_Sa, ends = self.patches(inputs)
        x_SD = x_SD + tower.fast_pos_embed_interpolate(inputs.extra["image_grid_thw"])
        order_U = np.arange(len(x_SD) // tower.spatial_merge_size**2)
        return Row(x_SD, angles_Sa, lambda _: ends, order_U)

    @property
    def deepstack(self) -> Mapping[int, Callable[[mx.array], mx.array]]:
        indexes, mergers = self.tower.deepstack_visual_indexes, self.tower.deepstack_merger_list
        return dict(zip(indexes, mergers, strict=True))
