"""Keep the patches whose embedding is longest, before the tower's first layer.

The L2 norm of the patch embedding, before positions are added; kept patches take their own
position rows along.

As the authors' code (github.com/denis7-jean/ece1512-projectA@5fbe62d), Vision-Token-Pruning. (Its
README speaks of keys and queries: that is `kq_norm`.)

Shapes: B images, N patches, D features, K kept.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage
from .numerics import choosing, keep_highest, to_choice_dtype

stage = Stage.ENCODER
needs: dict[str, str | None] = {"patches": None}


def cuts(layers: int, N: int, K: int) -> list[tuple[int, str, int]]:
    """Once, before the first layer."""
    return [(0, "before", K)]


def prune(signals: Signals, K: int) -> Reduction:
    """Keep the K longest."""
    with choosing():
        square_BN = mx.square(to_choice_dtype(signals.patches_BND)).sum(axis=-1)
        return Reduction(keep_highest(square_BN, K), score_BN=square_BN)
