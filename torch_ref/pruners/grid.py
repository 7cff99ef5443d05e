"""K even windows over a grid: disjoint, in raster order, covering everything.

Shapes: K windows.
"""

import math


def windows(grid: tuple[int, int], K: int) -> list[tuple[int, int, int, int]]:
    """K windows (top, bottom, left, right), ends exclusive.

    R bands of rows hold K / R windows each, as evenly as whole numbers allow. R is chosen so that
    windows are about square and no band needs more windows than there are columns.
    """
    rows, columns = grid
    square = math.floor(math.sqrt(K * rows / columns) + 0.5)
    bands = min(rows, K, max(math.ceil(K / columns), square))
    cut = []
    for r in range(bands):
        top, bottom = r * rows // bands, (r + 1) * rows // bands
        count = (r + 1) * K // bands - r * K // bands
        assert count <= columns
        cut += [
            (top, bottom, j * columns // count, (j + 1) * columns // count) for j in range(count)
        ]
    return cut


def centre(window: tuple[int, int, int, int], columns: int) -> int:
    """The index of a window's middle token; of two, the upper or left one."""
    top, bottom, left, right = window
    return (top + bottom - 1) // 2 * columns + (left + right - 1) // 2


def members(window: tuple[int, int, int, int], columns: int) -> list[int]:
    """The indices of a window's tokens."""
    top, bottom, left, right = window
    return [row * columns + column for row in range(top, bottom) for column in range(left, right)]
