"""Pixtral: pictures of any shape in one row, each attending to itself alone.

A break stands after every row of placeholders; these are words, and all of them stay.

Shapes: I pictures, S patches of all, N of one, k kept of all, D features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ....pruners.contract import Signals
from .common import hand_over, left, mark
from .llava import project

__all__ = ["hand_over", "left", "mark", "project", "see"]


def see(
    model: Any, pixels: Any, ids: Sequence[int], told: Mapping[str, Any]
) -> list[list[Signals]]:
    if isinstance(pixels, list):
        pixels = mx.stack([mx.array(each) for each in pixels])
    pixels_IHW3 = (pixels[None] if pixels.ndim == 3 else pixels).transpose(0, 2, 3, 1)
    sizes = told.get("image_sizes")
    *_, states = model.vision_tower(pixels_IHW3, output_hidden_states=True, image_sizes=sizes)
    x_1SD = states[model.vision_feature_layer]
    if sizes is None:  # then pictures fill their pixels
        sizes = [pixels_IHW3.shape[1:3]] * len(pixels_IHW3)
    seen, begin, patch = [], 0, model.vision_tower.vision_model.patch_size
    for height, width in np.array(sizes).tolist():
        end = begin + (height // patch) * (width // patch)
        seen.append([Signals(x_1SD[:, begin:end], (height // patch, width // patch))])
        begin = end
    return seen
