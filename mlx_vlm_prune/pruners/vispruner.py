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
from .lazy import AHEAD, HeldRows, highest, lazy_highest
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
            rest_BR = thin_out_images(signals.x_BND, rest_BR, K - by_attention)
        return Reduction(index_BK=mx.sort(mx.concatenate([important_BA, rest_BR], axis=1), axis=1))


def thin_out_images(x_BND: mx.array, rest_BR: mx.array, least: int) -> mx.array:
    """The residual without the tokens of A most similar to one of B, until `least` are left."""
    if choice_dtype() == mx.float32:
        return thin_out(cosine_rows(x_BND), rest_BR, least)
    rest = [
        thin_out_lazily(HeldRows(cosine_rows(x_BND[b : b + 1], hold=False)), rest_R, least)
        for b, rest_R in enumerate(np.array(rest_BR))
    ]
    return mx.array(np.stack(rest))


def thin_out(similar: Rows, order_BR: mx.array, least: int) -> mx.array:
    """The same of all images: one MLX graph."""
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


def thin_out_lazily(similar: HeldRows, order_R: np.ndarray, least: int) -> np.ndarray:
    """The same of one image by lazy evaluation: a token is no more similar to one of B than to its
    nearest."""
    rest_R, is_rest_N = order_R.astype(np.int64), np.zeros(similar.N, bool)
    is_rest_N[rest_R] = True
    nearest_N = np.array(nearest_similarity(similar, mx.array(is_rest_N[None]))[0])

    def likely() -> np.ndarray:
        return highest(np.where(is_rest_N, nearest_N, -np.inf), min(AHEAD, similar.N))

    while (R := len(rest_R)) > least:
        token_a, token_b = rest_R[::2], rest_R[1::2]

        def scores_of(
            index_n: np.ndarray, token_a: np.ndarray = token_a, token_b: np.ndarray = token_b
        ) -> np.ndarray:
            token_n = token_a[index_n]
            similar_nN = similar.take(token_n, likely)
            to_b_n: np.ndarray = similar_nN[:, token_b].max(axis=-1)
            np.put_along_axis(similar_nN, token_n[:, None], -np.inf, axis=1)
            to_a_n = similar_nN[:, token_a].max(axis=-1)
            nearest_N[token_n] = np.maximum(to_a_n, to_b_n)
            return to_b_n

        index_n = lazy_highest(nearest_N[token_a], leaving_of(R, least), scores_of)
        is_rest_N[token_a[index_n]] = False
        rest_R = rest_R[is_rest_N[rest_R]]
    return rest_R
