"""MustDrop's first stage (arXiv:2411.10803): windows of patches that are alike become one token.

Shapes: N tokens, K left, D features.
"""

import torch
from torch import Tensor

from .contract import Reduction, Signals, weighted_reduction
from .numerics import cosine

needs: dict[str, str | None] = {}


def cuts(layers: int, N: int, K: int) -> list[tuple[int, str, int]]:
    """(layer, place, how many stay)."""
    return [(0, "middle", K)] if layers == 1 else [(1, "before", K)]


def prune(signals: Signals, K: int, *, side: int = 3) -> Reduction:
    cells = windows(signals.grid, K, side)
    return weighted_reduction(signals, [merge(x_ND, cells, K) for x_ND in signals.x_BND])


def windows(grid: tuple[int, int], K: int, side: int) -> list[list[int]]:
    """The tokens of each window, of the smallest size that leaves at most K of them."""
    rows, columns = grid
    cells: dict[tuple[int, int], list[int]] = {}
    for token in range(rows * columns):
        row, column = divmod(token, columns)
        cells.setdefault((row // side, column // side), []).append(token)
    return list(cells.values()) if len(cells) <= K else windows(grid, K, side + 1)


def merge(x_ND: Tensor, cells: list[list[int]], K: int) -> tuple[list[int], Tensor]:
    """The token that stands for each slot, and its weights (K, N)."""
    N = len(x_ND)
    order = sorted(range(len(cells)), key=lambda w: (-likeness(x_ND[cells[w]]), w))
    groups, leaving = [], N - K
    for w in order:
        merged = min(leaving, len(cells[w]) - 1) + 1
        leaving -= merged - 1
        groups += [cells[w][:merged], *([token] for token in cells[w][merged:])]
    groups.sort(key=lambda group: group[len(group) // 2])
    weight_KN = torch.zeros(K, N, dtype=torch.float64)
    for k, group in enumerate(groups):
        weight_KN[k, group] = 1 / len(group)
    return [group[len(group) // 2] for group in groups], weight_KN


def likeness(x_MD: Tensor) -> float:
    """The mean cosine of every two."""
    M = len(x_MD)
    if M == 1:
        return -1.0
    pairs_MM = cosine(x_MD).fill_diagonal_(0)
    return round(pairs_MM.sum().item() / (M * (M - 1)), 12)
