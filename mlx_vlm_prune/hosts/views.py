"""What passes between a host's model and its pruning.

Shapes: N visual tokens of a view, K kept of them, L rows of the prompt, D features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..pruners.contract import Signals


@dataclass(frozen=True)
class Inputs:
    """What the model's own processor makes of a prompt and pictures."""

    ids: list[int]  # placeholders included
    mask_1L: mx.array
    pixels: mx.array | None = None  # laid out as the family's tower reads them
    images: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)  # such as image_grid_thw


@dataclass(frozen=True)
class View:
    """What the tower saw of an image: all of it, or one crop."""

    image: int  # whose
    signals: Signals  # of one picture
    pixels_HW3: mx.array | None = None  # as the tower read it; None: the whole picture
    deep: tuple[mx.array, ...] = ()  # (1, N, D) each, what DeepStack adds in the first layers
