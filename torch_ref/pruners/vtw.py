"""Visual Tokens Withdrawal (arXiv:2405.05803): from one layer on there are no visual tokens."""

import torch

from .contract import Reduction, Signals


def schedule(layers: int, N: int, K: int) -> dict[int, int]:
    if K * layers < N:
        raise ValueError(f"an average of {K} of {N} is less than one of {layers} layers holds")
    return {K * layers // N: 0}


def prune(signals: Signals, K: int) -> Reduction:
    return Reduction(torch.arange(K, device=signals.x_BND.device).expand(len(signals.x_BND), K))
