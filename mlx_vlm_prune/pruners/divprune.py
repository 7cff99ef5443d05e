"""Keep the tokens that lie farthest from one another.

DivPrune, Alvar et al., CVPR 2025, arXiv:2503.02175. Max-min diversity, solved greedily:
with d(i, j) = 1 - cos(x_i, x_j), the first token kept is the one whose nearest neighbour
is farthest; each next one is the farthest from all those kept so far.

Differs from the authors' code: a kept token is never chosen again. On a flat image all
distances are equal, and a plain argmax keeps one token K times.

Shapes: B images, N tokens, K kept.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage, take
from .numerics import choice_dtype, choosing, cosine

stage = Stage.PROJECTED


def prune(signals: Signals, K: int) -> Reduction:
    """Keep K. The K steps are one MLX graph."""
    with choosing():
        distance_BNN = 1 - cosine(signals.x_BND)
        B, N, _ = distance_BNN.shape
        score_BN = mx.where(mx.eye(N) > 0, mx.inf, distance_BNN).min(axis=-1)
        gap_BN = mx.full((B, N), mx.inf).astype(choice_dtype())  # to the nearest kept token
        kept = []
        for _ in range(K):
            i_B1 = mx.argmax(score_BN, axis=-1, keepdims=True)
            kept.append(i_B1)
            gap_BN = mx.minimum(gap_BN, take(distance_BNN, i_B1)[:, 0])
            score_BN = gap_BN = mx.where(mx.arange(N) == i_B1, -mx.inf, gap_BN)
        return Reduction(index_BK=mx.sort(mx.concatenate(kept, axis=1), axis=1))
