"""Keep one half by CLS attention, the other half by how unlike the others they are.

VisPruner, Zhang et al., ICCV 2025, arXiv:2412.01818. Important: the highest CLS
attention, `important` of the budget. Diverse: the residual, in order of attention, is
dealt alternately into A and B, and the (at most 8) tokens of A most similar to one of B
leave; this is repeated until the budget is met.

Options:
    important: share of K chosen by CLS attention, 0 to 1
    layer: number of the tower's layer that is read; -1 is the last

Shapes: B images, N tokens, K kept, R residual, a and b tokens in A and B.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage, take
from .numerics import choice_dtype, choosing, cosine, keep_highest

stage = Stage.FEATURES
needs = {"cls_attention": "layer"}
MOST_PER_ROUND = 8  # tokens that leave in a round


def prune(signals: Signals, K: int, *, important: float = 0.5, layer: float = -1) -> Reduction:
    """Keep K; `layer` is read by the host."""
    if not 0 <= important <= 1:
        raise ValueError(f"important is {important}; it is a share of K from 0 to 1")
    by_attention = int(K * important)
    with choosing():
        similar_BNN = cosine(signals.x_BND)
        order_BN = mx.argsort(-signals.cls_attention_BN.astype(mx.float32), axis=-1)
        rest_BR = order_BN[:, by_attention:]
        while rest_BR.shape[1] > K - by_attention:
            if by_attention == K:
                rest_BR = rest_BR[:, :0]
                break
            rest_BR = drop_most_similar(similar_BNN, rest_BR, K - by_attention)
        index_BK = mx.concatenate([order_BN[:, :by_attention], rest_BR], axis=1)
        return Reduction(index_BK=mx.sort(index_BK, axis=1))


def drop_most_similar(similar_BNN: mx.array, rest_BR: mx.array, least: int) -> mx.array:
    """The residual without the tokens of A most similar to one of B."""
    R = rest_BR.shape[1]
    similar_Bab = take(take(similar_BNN, rest_BR[:, ::2]), rest_BR[:, 1::2], axis=2)
    similar_BR = mx.full((len(rest_BR), R), -mx.inf).astype(choice_dtype())
    similar_BR[:, ::2] = similar_Bab.max(axis=-1)
    leaving = min(MOST_PER_ROUND, R - least, (R + 1) // 2)
    rank_BR = mx.argsort(mx.argsort(-similar_BR, axis=-1), axis=-1)
    return take(rest_BR, keep_highest(rank_BR >= leaving, R - leaving))
