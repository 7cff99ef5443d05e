"""Keep the tokens with the largest L2 norm.

As the authors' code (github.com/aledevv/fastvlm-token-pruning@c8feda6), method "norm".

Shapes: B images, N tokens, D features, K kept.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage
from .numerics import choosing, keep_highest, to_choice_dtype

stage = Stage.FEATURES


def prune(signals: Signals, K: int) -> Reduction:
    """Keep the K tokens of largest norm."""
    with choosing():
        square_BN = mx.square(to_choice_dtype(signals.x_BND)).sum(axis=-1)
        return Reduction(keep_highest(square_BN, K), score_BN=square_BN)
