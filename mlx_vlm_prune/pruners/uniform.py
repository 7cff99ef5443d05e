"""Keep the middle token of each of K windows: an even grid over the image.

Shapes: B images, K kept.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage
from .grid import centre, windows

stage = Stage.FEATURES
needs = {"grid": None}


def prune(signals: Signals, K: int) -> Reduction:
    """Keep K evenly spaced tokens."""
    index_K = mx.array(sorted(centre(window) for window in windows(signals.grid, K)))
    return Reduction(index_BK=mx.broadcast_to(index_K, (len(signals.x_BND), K)))
