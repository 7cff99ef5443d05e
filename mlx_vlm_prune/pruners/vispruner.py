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
import numpy as np

from .contract import Reduction, Signals, Stage, take
from .lazy import lazy_highest
from .numerics import choice_dtype, choosing
from .rows import Rows, cosine_rows, nearest_similarity

stage = Stage.FEATURES
needs = {"cls_attention": "layer"}
MOST_PER_ROUND = 8  # tokens that leave in a round


def prune(signals: Signals, K: int, *, important: float = 0.5, layer: float = -1) -> Reduction:
    """Keep K; `layer` is read by the host."""
    if not 0 <= important <= 1:
        raise ValueError(f"important is {important}; it is a share of K from 0 to 1")
    by_attention = int(K * important)
    with choosing():
        order_BN = mx.argsort(-signals.cls_attention_BN.astype(mx.float32), axis=-1)
        important_BA, rest_BR = order_BN[:, :by_attention], order_BN[:, by_attention:]
        if by_attention == K:
            rest_BR = rest_BR[:, :0]
        else:
            thin = thin_out_lazily if choice_dtype() == mx.float64 else thin_out
            rest_BR = thin(cosine_rows(signals.x_BND), rest_BR, K - by_attention)
        return Reduction(index_BK=mx.sort(mx.concatenate([important_BA, rest_BR], axis=1), axis=1))


def thin_out(similar: Rows, order_BR: mx.array, least: int) -> mx.array:
    """The residual without the tokens of A most similar to one of B, until `least` are left: one
    MLX graph."""
    apart = Rows(lambda part_Bn: -take(similar.take(part_Bn), order_BR, axis=2), order_BR)
    place_BR = mx.broadcast_to(mx.arange(apart.N, dtype=mx.uint32), order_BR.shape)
    while (R := place_BR.shape[1]) > least:
        a_Ba, b_Bb = place_BR[:, ::2], place_BR[:, 1::2]
        nearest_Ba = take(apart.take(a_Ba), b_Bb, axis=2).min(axis=-1)
        staying_Ba = mx.argsort(nearest_Ba, axis=-1)[:, leaving_of(R, least) :]
        place_BR = mx.sort(mx.concatenate([take(a_Ba, staying_Ba), b_Bb], axis=1), axis=1)
    return take(order_BR, place_BR)


def leaving_of(R: int, least: int) -> int:
    """How many of a residual leave in a round."""
    return min(MOST_PER_ROUND, R - least, (R + 1) // 2)


def thin_out_lazily(similar: Rows, order_BR: mx.array, least: int) -> mx.array:
    """The same by lazy evaluation: a token is no more similar to one of B than to its nearest."""
    rest_BR, image_B1 = np.array(order_BR).astype(np.int64), np.arange(len(order_BR))[:, None]
    is_rest_BN = np.zeros((len(rest_BR), similar.N), bool)
    is_rest_BN[image_B1, rest_BR] = True
    nearest_BN = np.array(nearest_similarity(similar, mx.array(is_rest_BN)))
    while (R := rest_BR.shape[1]) > least:
        token_Ba, is_b_BN = rest_BR[:, ::2], np.zeros_like(is_rest_BN)
        is_b_BN[image_B1, rest_BR[:, 1::2]] = True

        def scores_of(
            index_Bn: np.ndarray, token_Ba: np.ndarray = token_Ba, is_b_BN: np.ndarray = is_b_BN
        ) -> np.ndarray:
            token_Bn = token_Ba[image_B1, index_Bn]
            similar_BnN = np.array(similar.take(mx.array(token_Bn)))
            np.put_along_axis(similar_BnN, token_Bn[..., None], -np.inf, axis=2)
            to_rest_BnN = np.where(is_rest_BN[:, None], similar_BnN, -np.inf)
            nearest_BN[image_B1, token_Bn] = to_rest_BnN.max(axis=-1)
            return np.where(is_b_BN[:, None], similar_BnN, -np.inf).max(axis=-1)

        index_Bn = lazy_highest(nearest_BN[image_B1, token_Ba], leaving_of(R, least), scores_of)
        is_rest_BN[image_B1, token_Ba[image_B1, index_Bn]] = False
        rest_BR = rest_BR[is_rest_BN[image_B1, rest_BR]].reshape(len(rest_BR), -1)
    return mx.array(rest_BR)
