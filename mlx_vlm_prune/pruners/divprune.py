"""Keep the tokens that lie farthest from one another.

DivPrune, Alvar et al., CVPR 2025, arXiv:2503.02175. Max-min diversity, solved greedily:
with d(i, j) = 1 - cos(x_i, x_j), the first token kept is the one whose nearest neighbour
is farthest; each next one is the farthest from all those kept so far.

Differs from the authors' code: a kept token is never chosen again. On a flat image all
distances are equal, and a plain argmax keeps one token K times.

Shapes: B images, N tokens, K kept.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage
from .numerics import after_step, choosing
from .rows import cosine_rows, nearest_similarity

stage = Stage.PROJECTED


def prune(signals: Signals, K: int) -> Reduction:
    """Keep K. The K steps are one MLX graph, and read one row of distances each."""
    with choosing():
        similar = cosine_rows(signals.x_BND)
        score_BN = 1 - nearest_similarity(similar)
        gap_BN = mx.full(score_BN.shape, mx.inf).astype(score_BN.dtype)  # to the nearest kept token
        kept, token_N = [], mx.arange(score_BN.shape[1])
        for _ in range(K):
            i_B1 = mx.argmax(score_BN, axis=-1, keepdims=True)
            kept.append(i_B1)
            gap_BN = mx.minimum(gap_BN, 1 - similar.take(i_B1)[:, 0])
            score_BN = gap_BN = mx.where(token_N == i_B1, -mx.inf, gap_BN)
            after_step(len(kept), gap_BN)
        return Reduction(index_BK=mx.sort(mx.concatenate(kept, axis=1), axis=1))
