"""Keep K tokens drawn at random: the baseline that many published methods do not beat.

Every image of a batch gets the same draw, so that a batch equals one image at a time.

Options:
    seed: seed of the draw, 0 or more

Shapes: B images, N tokens, K kept.
"""

import mlx.core as mx
import numpy as np

from .contract import Reduction, Signals, Stage

stage = Stage.FEATURES


def prune(signals: Signals, K: int, *, seed: int = 0) -> Reduction:
    """Keep K tokens of a draw that depends on the seed and N alone."""
    B, N, _ = signals.x_BND.shape
    index_K = np.sort(np.random.default_rng(seed).permutation(N)[:K])
    return Reduction(index_BK=mx.broadcast_to(mx.array(index_K), (B, K)))
