"""Any K tokens, the same of every image: what every method must beat.

numpy draws in both frameworks, so that both draw the same.
"""

import numpy as np
import torch

from .contract import Reduction, Signals


def prune(signals: Signals, K: int, *, seed: int = 0) -> Reduction:
    B, N, _ = signals.x_BND.shape
    index_K = np.sort(np.random.default_rng(seed).permutation(N)[:K])
    return Reduction(torch.from_numpy(index_K).to(signals.x_BND.device).expand(B, K))
