"""The mean of each of K even windows, standing where its middle token stood."""

import torch

from .contract import Reduction, Signals
from .grid import centre, members, windows


def prune(signals: Signals, K: int) -> Reduction:
    B, N, _ = signals.x_BND.shape
    columns = signals.grid[1]
    cut = sorted(windows(signals.grid, K), key=lambda window: centre(window, columns))
    weight_KN = torch.zeros(K, N, device=signals.x_BND.device)
    for k, window in enumerate(cut):
        inside = members(window, columns)
        weight_KN[k, inside] = 1 / len(inside)
    index = torch.tensor([centre(w, columns) for w in cut], device=signals.x_BND.device)
    return Reduction(index.expand(B, K), weight_KN.expand(B, K, N))
