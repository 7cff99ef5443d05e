"""Cut a grid of tokens into K windows.

Shapes: N tokens of the grid, K windows.
"""

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from .numerics import choice_dtype


def windows(grid: tuple[int, int], K: int) -> list[np.ndarray]:
    """K disjoint windows that cover the grid, in raster order, each a 2D array of token indices.

    The rows are divided into bands and each band into its share of the windows, so any K from 1
    to N works; windows are as square as K allows.
    """
    rows, columns = grid
    assert 1 <= K <= rows * columns
    square = math.floor(math.sqrt(K * rows / columns) + 0.5)
    bands = min(rows, K, max(-(-K // columns), square))
    cells = np.arange(rows * columns).reshape(rows, columns)
    cut = []
    for r in range(bands):
        band = cells[r * rows // bands : (r + 1) * rows // bands]
        share = (r + 1) * K // bands - r * K // bands
        assert 1 <= share <= columns
        for j in range(share):
            cut.append(band[:, j * columns // share : (j + 1) * columns // share])
    return cut


def of_one_size(areas: Sequence[np.ndarray]) -> list[tuple[list[int], np.ndarray]]:
    """Windows of as many tokens together: their numbers, and their tokens, a row each. On a CPU
    each is alone, so that what is computed of it stays in the cache."""
    numbers: dict[int, list[int]] = {}
    for number, area in enumerate(areas):
        size = -number if choice_dtype() == mx.float64 else area.size
        numbers.setdefault(size, []).append(number)
    return [(some, np.stack([areas[i].ravel() for i in some])) for some in numbers.values()]


def centre(window: np.ndarray) -> int:
    """The index of a window's middle token; of two, the upper or left one."""
    return int(window[(window.shape[0] - 1) // 2, (window.shape[1] - 1) // 2])
