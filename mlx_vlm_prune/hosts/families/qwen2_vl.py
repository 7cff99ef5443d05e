"""Qwen2-VL: every layer of the tower sees the whole image."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..views import Inputs, View
from .qwen import Row, patches, qwen, run


def see(model: Any, inputs: Inputs, want: Mapping[str, int | None]) -> list[View]:
    x_SD, angles_Sa, ends = patches(model, inputs)
    order_U = np.arange(len(x_SD) // model.vision_tower.spatial_merge_size**2)
    return run(model, inputs, want, Row(x_SD, angles_Sa, lambda _: ends, order_U))


family = qwen(see)
