"""Qwen3-VL: learned positions beside the rotation, and DeepStack.

DeepStack: the language model's first layers add features of inner tower layers to the visual rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import mlx.core as mx

from ..prepared_inputs import PreparedInputs
from .packed_patches import PackedPatches
from .qwen2_vl import Qwen2VLHost


class Qwen3VLHost(Qwen2VLHost):
    parts_frames = True
    why_not_learned = (
        "training would read the rows without what DeepStack adds to them in the first layers"
    )

    @property
    def feature_dims(self) -> None:
        """No method learns here."""
        return None

    def pack_patches(self, inputs: PreparedInputs) -> PackedPatches:
        packed, grids_I3 = super().pack_patches(inputs), inputs.grids_I3
        return replace(packed, x_SD=packed.x_SD + self.tower.fast_pos_embed_interpolate(grids_I3))

    @property
    def deepstack(self) -> Mapping[int, Callable[[mx.array], mx.array]]:
        indexes, mergers = self.tower.deepstack_visual_indexes, self.tower.deepstack_merger_list
        return dict(zip(indexes, mergers, strict=True))
