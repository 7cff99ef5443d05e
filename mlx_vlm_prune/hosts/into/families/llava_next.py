"""LLaVA-NeXT: of one image a small picture of the whole, and crops at full size.

mlx-vlm puts a block of rows in place of each of the first placeholders and drops the others, so
one placeholder and one block say the same. Behind the crops it puts as many copies of the newline
embedding as there are patches, which tell nothing of the image: they go as soon as anything does.

Shapes: C crops, k visual tokens, L rows of the prompt, l left, D features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ....pruners.contract import Reduction, Signals
from .common import mark, only
from .llava import project, seen_by

__all__ = ["hand_over", "left", "mark", "project", "see"]


def see(
    model: Any, pixels_1C3HW: mx.array, ids: Sequence[int], told: Mapping[str, Any]
) -> list[list[Signals]]:
    return [seen_by(model, only(pixels_1C3HW)[0])]


def left(
    ids: Sequence[int], placeholder: int, seen: Sequence[Signals], kept: Sequence[Reduction]
) -> mx.array:
    """The rows (l,) of all words, and of the first placeholder."""
    at = np.flatnonzero(np.array(ids) == placeholder)
    return mx.array(np.delete(np.arange(len(ids)), at[1:]).astype(np.int32))


def hand_over(model: Any, x_1kD: mx.array, is_full: bool) -> Any:
    """One block; a whole one with its newlines."""
    if not is_full:
        return x_1kD
    return mx.concatenate([x_1kD, mx.broadcast_to(model.image_newline, x_1kD.shape)], axis=1)
