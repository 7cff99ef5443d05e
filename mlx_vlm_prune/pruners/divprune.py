"""Keep the tokens that lie farthest from one another.

DivPrune, Alvar et al., CVPR 2025, arXiv:2503.02175. Max-min diversity, solved greedily:
with d(i, j) = 1 - cos(x_i, x_j), the first token kept is the one whose nearest neighbour
is farthest; each next one is the farthest from all those kept so far.

As the authors' code (github.com/vbdi/divprune@799e2d9). Differs: a kept token is never chosen
again (on a flat image all distances are equal, and a plain argmax keeps one token K times).

Shapes: B images, N tokens, K kept.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage
from .numerics import after_step, choosing, fused
from .rows import cosine_rows, nearest_similarity

stage = Stage.PROJECTED
KEPT = -1.0  # in place of a kept token's distance; any other is at least 0, but for rounding


def prune(signals: Signals, K: int) -> Reduction:
    """Keep K. The K steps are one MLX graph, and read one row of distances each."""
    with choosing():
        similar = cosine_rows(signals.x_BND)
        score_BN = 1 - nearest_similarity(similar)
        gap_BN = mx.full(score_BN.shape, 4, dtype=score_BN.dtype)  # to the nearest kept token
        token_N = mx.arange(score_BN.shape[1], dtype=mx.uint32)
        for step in range(1, K + 1):
            i_B1 = mx.argmax(score_BN, axis=-1, keepdims=True)
            gap_BN = gaps_after(gap_BN, similar.take(i_B1)[:, 0], i_B1, token_N)
            score_BN = gap_BN
            after_step(step, gap_BN)
        return Reduction(index_BK=mx.argsort(gap_BN, axis=-1)[:, :K])  # stable: kept ones first


@fused
def gaps_after(
    gap_BN: mx.array, similar_BN: mx.array, i_B1: mx.array, token_N: mx.array
) -> mx.array:
    """Distances to the nearest kept token when one more is kept."""
    return mx.where(token_N == i_B1, KEPT, mx.minimum(gap_BN, 1 - similar_BN))
