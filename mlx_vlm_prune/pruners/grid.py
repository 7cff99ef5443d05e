"""Cut a grid of tokens into K windows.

Shapes: N tokens of the grid, K windows.
"""

import math

import numpy as np


def windows(grid: tuple[int, int], K: int) -> list[np.ndarray]:
    """K disjoint windows in raster order that cover the grid, each the indices of its tokens.

    The rows are divided into bands, each band into its share of the windows, so any
    K from 1 to N works; windows are as square as K allows.
    """
    rows, columns = grid
    assert 1 <= K <= rows * columns
    square = math.floor(math.sqrt(K * rows / columns) + 0.5)
    bands = min(rows, K, max(-(-K // columns), square))
    cells = np.arange(rows * columns).reshape(rows, columns)
    covering = []
    for r in range(bands):
        band = cells[r * rows // bands : (r + 1) * rows // bands]
        share = (r + 1) * K // bands - r * K // bands
        assert 1 <= share <= columns
        for j in range(share):
            covering.append(band[:, j * columns // share : (j + 1) * columns // share])
    return covering


def centre(window: np.ndarray) -> int:
    """The token in the middle of a window; the upper left one of an even number."""
    return int(window[(window.shape[0] - 1) // 2, (window.shape[1] - 1) // 2])
