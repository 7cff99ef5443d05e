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
from .numerics import after_step, choosing, constant, fused
from .rows import cosine_rows, nearest_similarity

stage = Stage.PROJECTED
# In place of a kept token's distance, here times the number of its step; any other is at least 0,
# but for rounding.
KEPT = -1.0


def prune(signals: Signals, K: int) -> Reduction:
    """Keep K."""
    with choosing():
        return Reduction(mx.sort(farthest(signals.x_BND, K), axis=-1))


def farthest(x_BND: mx.array, K: int) -> mx.array:
    """Greedily the K tokens farthest from one another, in the order of choice, (B, K). The K steps
    are one MLX graph, and read one row of distances each."""
    similar = cosine_rows(x_BND)
    score_BN = 1 - nearest_similarity(similar)
    gap_BN = mx.full(score_BN.shape, 4, dtype=score_BN.dtype)  # to the nearest kept token
    token_N = mx.arange(score_BN.shape[1], dtype=mx.uint32)
    for step in range(1, K + 1):
        i_B1, mark = mx.argmax(score_BN, axis=-1, keepdims=True), constant(KEPT * step)
        gap_BN = gaps_after(gap_BN, similar.take(i_B1)[:, 0], i_B1, token_N, mark)
        score_BN = gap_BN
        after_step(step, gap_BN)
    return mx.argsort(gap_BN, axis=-1)[:, :K][:, ::-1]  # the last one kept is lowest


@fused
def gaps_after(
    gap_BN: mx.array, similar_BN: mx.array, i_B1: mx.array, token_N: mx.array,
    mark: mx.array | float = KEPT,
) -> mx.array:  # fmt: skip
    """Distances to the nearest kept token when one more is kept, which gets the mark."""
    return mx.where(token_N == i_B1, mark, mx.minimum(gap_BN, 1 - similar_BN))
