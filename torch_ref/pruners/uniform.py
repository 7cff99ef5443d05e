"""The middle token of each of K even windows."""

import torch

from .contract import Reduction, Signals
from .grid import centre, windows


def prune(signals: Signals, K: int) -> Reduction:
    B, columns = len(signals.x_BND), signals.grid[1]
    index = sorted(centre(window, columns) for window in windows(signals.grid, K))
    return Reduction(torch.tensor(index, device=signals.x_BND.device).expand(B, K))
