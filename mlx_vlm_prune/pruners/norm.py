"""Keep the tokens with the largest L2 norm.

fastvlm-token-pruning (github.com/aledevv/fastvlm-token-pruning), method "norm".

Shapes: B images, N tokens, D features, K kept.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage, keep_highest

stage = Stage.FEATURES
needs = frozenset[str]()


def prune(signals: Signals, K: int) -> Reduction:
    """Keep the K tokens of largest norm."""
    norm_BN = mx.linalg.norm(signals.x_BND.astype(mx.float32), axis=-1)
    return Reduction(index_BK=keep_highest(norm_BN, K))
