"""PixelPrune (arXiv:2604.00886): the K patches that their left and upper neighbours predict worst.

Shapes: N patches of P pixel values.
"""

import torch
from torch import Tensor

from .contract import Reduction, Signals
from .numerics import keep_highest

needs: dict[str, str | None] = {"pixels": None}


def cuts(layers: int, N: int, K: int) -> list[tuple[int, str, int]]:
    return [(0, "before", K)]


def prune(signals: Signals, K: int, tolerance: float = 0.0) -> Reduction:
    pixels_BNP, grid = signals.pixels_BND.float(), signals.grid
    error_BN = torch.stack([prediction_errors(x_NP, grid, tolerance) for x_NP in pixels_BNP])
    return Reduction(keep_highest(error_BN, K))


def prediction_errors(x_NP: Tensor, grid: tuple[int, int], tolerance: float) -> Tensor:
    """Largest difference of each patch to its prediction, (N,)."""
    rows, columns = grid
    x_NP = x_NP.clone()  # a patch that is predicted becomes its prediction
    error = torch.full((rows * columns,), torch.inf)
    for i in range(1, rows * columns):
        row, column = divmod(i, columns)
        if row == 0:
            predictor = i - 1
        elif column == 0:
            predictor = i - columns
        else:
            left, up, corner = (x_NP[i - back] for back in (1, columns, columns + 1))
            is_like_left = (corner - left).abs().max() <= tolerance
            is_like_up = (corner - up).abs().max() <= tolerance
            predictor = i - columns if is_like_left and not is_like_up else i - 1
        error[i] = (x_NP[i] - x_NP[predictor]).abs().max()
        if error[i] <= tolerance:
            x_NP[i] = x_NP[predictor]
    return error
