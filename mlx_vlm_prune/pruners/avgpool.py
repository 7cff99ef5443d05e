"""Average the tokens of each of K windows: the image at a coarser grain.

Shapes: B images, N tokens, K slots.
"""

import mlx.core as mx
import numpy as np

from .contract import Reduction, Signals, Stage
from .grid import centre, windows

stage = Stage.FEATURES
needs = {"grid": None}


def prune(signals: Signals, K: int) -> Reduction:
    """Merge each window into its mean, at the position of its middle token."""
    B, N, _ = signals.x_BND.shape
    pooled = sorted(windows(signals.grid, K), key=centre)
    slot_N = np.zeros(N, np.int32)
    for slot, window in enumerate(pooled):
        slot_N[window.ravel()] = slot
    index_K = mx.array([centre(window) for window in pooled])
    slot_BN = mx.broadcast_to(mx.array(slot_N), (B, N))
    return Reduction.merge(mx.broadcast_to(index_K, (B, K)), slot_BN)
