"""The image itself, made smaller: the largest grid of its proportions with at most K tokens."""

import torch

from .contract import Reduction


def smaller_grid(grid: tuple[int, int], K: int) -> tuple[int, int]:
    """(rows, columns) of at most K tokens."""
    scale = (K / (grid[0] * grid[1])) ** 0.5
    tries = [
        (int(grid[0] * scale) + up, int(grid[1] * scale) + across)
        for up in (0, 1)
        for across in (0, 1)
    ]
    fit = [(r, c) for r, c in tries if 0 < r <= grid[0] and 0 < c <= grid[1] and r * c <= K]
    return max([(1, 1), *fit], key=lambda size: size[0] * size[1])


def block_means(grid: tuple[int, int], small: tuple[int, int], B: int) -> Reduction:
    """Slots that are means of blocks of the whole image, each at its block's middle token."""
    (rows, columns), (r, c) = grid, small
    index, weight = [], torch.zeros(r * c, rows * columns)
    for k in range(r * c):
        down = [i for i in range(rows) if i * r // rows == k // c]
        along = [i for i in range(columns) if i * c // columns == k % c]
        inside = [i * columns + j for i in down for j in along]
        weight[k, inside] = 1 / len(inside)
        index.append(down[(len(down) - 1) // 2] * columns + along[(len(along) - 1) // 2])
    return Reduction(torch.tensor(index).expand(B, -1), weight.expand(B, -1, -1))
