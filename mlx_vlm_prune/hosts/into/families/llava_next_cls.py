"""LLaVA-NeXT with CLIP, and what its CLS attends to in each crop."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from ....pruners.contract import Signals
from .common import mark, only
from .llava import project
from .llava_cls import seen_by
from .llava_next import hand_over, left

__all__ = ["hand_over", "left", "mark", "project", "see"]


def see(
    model: Any, pixels_1C3HW: mx.array, ids: Sequence[int], told: Mapping[str, Any]
) -> list[list[Signals]]:
    return [seen_by(model, only(pixels_1C3HW)[0])]
