"""Qwen3-VL: learned positions beside the rotation, and DeepStack: features of inner layers that
the language model's first layers add to the visual rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import mlx.core as mx

from ..prepared_inputs import PreparedInputs
from .qwen2_vl import Qwen2VLHost, Row


class Qwen3VLHost(Qwen2VLHost):
    def pack(self, inputs: PreparedInputs) -> Row:
        row, place = super().pack(inputs), self.tower.fast_pos_embed_interpolate
        return replace(row, x_SD=row.x_SD + place(inputs.extra["image_grid_thw"]))

    @property
    def deepstack(self) -> Mapping[int, Callable[[mx.array], mx.array]]:
        indexes, mergers = self.tower.deepstack_visual_indexes, self.tower.deepstack_merger_list
        return dict(zip(indexes, mergers, strict=True))
