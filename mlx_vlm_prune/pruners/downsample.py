"""Make the image itself smaller: the baseline that every method should beat.

Liao et al., "Are We Using the Right Benchmark", ACL 2026, arXiv:2510.07143, find that plain
down-sampling beats many published methods. The pixels are resized to as many patches as
the budget allows, and the tower's position embeddings with them, so the tower too has
less to do. K may have no grid of its own: then the largest grid of about the image's
shape with at most K tokens is used.

As the authors' code (github.com/Chenfei-Liao/VTC-Bench@983e443) in the grid. Differs: K gives the
grid, where theirs divides the picture's width and height by a whole number and leaves the rest to
Qwen2-VL's processor; the picture is resized once, theirs twice, by way of a JPEG file.

Shapes: B images, N tokens of the whole image, K slots.
"""

import mlx.core as mx
import numpy as np

from .contract import Reduction, Stage

stage = Stage.IMAGE
needs = {"grid": None}


def smaller_grid(grid: tuple[int, int], K: int) -> tuple[int, int]:
    """(rows, columns) of at most K tokens, both within one of the image's own proportions."""
    scale = (K / (grid[0] * grid[1])) ** 0.5
    best = (1, 1)
    for r in (int(grid[0] * scale), int(grid[0] * scale) + 1):
        for c in (int(grid[1] * scale), int(grid[1] * scale) + 1):
            fits = 1 <= r <= grid[0] and 1 <= c <= grid[1] and r * c <= K
            if fits and r * c > best[0] * best[1]:
                best = (r, c)
    return best


def block_means(grid: tuple[int, int], small: tuple[int, int], B: int) -> Reduction:
    """The reduction to the smaller grid, whose slots are means of blocks of the whole image: for
    positions and overlays, since the pixels themselves are resized."""
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    home_N = row * small[0] // grid[0] * small[1] + column * small[1] // grid[1]
    K = small[0] * small[1]
    middle_K = [_middle(np.flatnonzero(home_N == slot), grid[1]) for slot in range(K)]
    index_BK = mx.broadcast_to(mx.array(middle_K), (B, K))
    return Reduction.merge(index_BK, mx.broadcast_to(mx.array(home_N), (B, len(home_N))))


def _middle(members: np.ndarray, columns: int) -> int:
    """The index of a block's middle token; of two, the upper or left one."""
    rows, across = np.unique(members // columns), np.unique(members % columns)
    return int(rows[(len(rows) - 1) // 2] * columns + across[(len(across) - 1) // 2])
