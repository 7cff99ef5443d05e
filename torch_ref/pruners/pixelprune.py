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
    images = [
        prediction_errors(image, signals.grid, tolerance) for image in signals.pixels_BND.float()
    ]
    return Reduction(keep_highest(torch.stack(images), K))


def prediction_errors(patch_NP: Tensor, grid: tuple[int, int], tolerance: float) -> Tensor:
    """The largest difference to the prediction, patch by patch, (N,)."""
    rows, columns = grid
    error = torch.full((rows * columns,), torch.inf)
    for i in range(1, rows * columns):
        row, column = divmod(i, columns)
        if row == 0:
            guess = i - 1
        elif column == 0:
            guess = i - columns
        else:
            left, up, corner = (patch_NP[i - back] for back in (1, columns, columns + 1))
            like_left = (corner - left).abs().max() <= tolerance
            like_up = (corner - up).abs().max() <= tolerance
            guess = i - columns if like_left and not like_up else i - 1
        error[i] = (patch_NP[i] - patch_NP[guess]).abs().max()
    return error
