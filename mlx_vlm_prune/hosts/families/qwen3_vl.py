"""Qwen3-VL: learned positions beside the rotation, and DeepStack: features of inner layers that
the language model's first layers add to the visual rows.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..views import Inputs, View
from .qwen import Row, patches, qwen, run


def see(model: Any, inputs: Inputs, want: Mapping[str, int | None]) -> list[View]:
    tower = model.vision_tower
    x_SD, angles_Sa, ends = patches(model, inputs)
    x_SD = x_SD + tower.fast_pos_embed_interpolate(inputs.extra["image_grid_thw"])
    order_U = np.arange(len(x_SD) // tower.spatial_merge_size**2)
    row = Row(x_SD, angles_Sa, lambda _: ends, order_U)
    deep = dict(zip(tower.deepstack_visual_indexes, tower.deepstack_merger_list, strict=True))
    return run(model, inputs, want, row, deep)


family = qwen(see)
