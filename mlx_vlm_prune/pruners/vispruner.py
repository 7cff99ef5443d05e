"""Keep one half by CLS attention, the other half by how unlike the others they are.

VisPruner, Zhang et al., ICCV 2025, arXiv:2412.01818. Important: the highest CLS
attention, `important` of the budget. Diverse: the residual, in order of attention, is
dealt alternately into A and B, and the (at most 8) tokens of A most similar to one of B
leave; this is repeated until the budget is met. What is left of A, the most similar to
one of B first, and then B are what the next round deals, as in the authors' code.

As the authors' code (github.com/Theia-4869/VisPruner@aefa01a). Differs: where half of the residual
is less than what must leave or the residual is odd, fewer leave in a round, and A has one token
more, where theirs fails.

Options:
    important: share of K chosen by CLS attention, 0 to 1
    layer: number of the tower's layer that is read; -1 is the last

Shapes: B images, N tokens, K kept, R residual, a and b tokens in A and B, n some of them, M listed.
"""

import mlx.core as mx
import numpy as np

from .contract import Reduction, Signals, Stage, take
from .numerics import choice_dtype, choosing
from .rows import BLOCK, Rows, cosine_rows

stage = Stage.FEATURES
needs = {"cls_attention": "layer"}
MOST_PER_ROUND = 8  # tokens that leave in a round
LISTED = 64  # of each token's most similar ones


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
        index_BK = mx.sort(mx.concatenate([important_BA, rest_BR], axis=1), axis=1)
        return Reduction(index_BK, score_BN=signals.cls_attention_BN)


def thin_out_images(x_BND: mx.array, rest_BR: mx.array, least: int) -> mx.array:
    """The residual without the tokens of A most similar to one of B, until `least` are left."""
    if choice_dtype() == mx.float32:
        return thin_out(cosine_rows(x_BND), rest_BR, least)
    rest = [
        thin_out_on_host(cosine_rows(x_BND[b : b + 1], hold=False), rest_R, least)
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
        place_BR = mx.concatenate([take(a_Ba, staying_Ba), b_Bb], axis=1)
    return take(order_BR, place_BR)


def leaving_of(R: int, least: int) -> int:
    """How many of a residual leave in a round."""
    return min(MOST_PER_ROUND, R - least, (R + 1) // 2)


def thin_out_on_host(similar: Rows, order_R: np.ndarray, least: int) -> np.ndarray:
    """The same of one image, from a list of each token's most similar ones."""
    rest_R, neighbours = order_R.astype(np.int64), Neighbours(similar, order_R)
    while (R := len(rest_R)) > least:
        token_a, token_b = rest_R[::2], rest_R[1::2]
        order_a = np.argsort(-neighbours.largest_similarity(token_a, token_b), kind="stable")
        leaving = leaving_of(R, least)
        neighbours.is_left_N[token_a[order_a[:leaving]]] = False
        rest_R = np.concatenate([token_a[order_a[leaving:]], token_b])
    return rest_R


class Neighbours:
    """Of each token the most similar ones among those left when its list was last made."""

    def __init__(self, similar: Rows, left_R: np.ndarray) -> None:
        self.similar, self.M = similar, min(LISTED, similar.N)
        self.is_left_N = np.zeros(similar.N, bool)
        self.is_left_N[left_R] = True
        self.token_NM = np.empty((similar.N, self.M), np.int64)
        self.similar_NM = np.empty((similar.N, self.M))
        for first in range(0, len(left_R), BLOCK):
            self.list_of(left_R[first : first + BLOCK])

    def list_of(self, token_n: np.ndarray) -> np.ndarray:
        """Make the lists of some tokens; their rows of similarities, -inf of what is not left."""
        row_nN: np.ndarray = np.array(self.similar.take(mx.array(token_n[None]))[0])
        row_nN[:, ~self.is_left_N] = -np.inf
        np.put_along_axis(row_nN, token_n[:, None], -np.inf, axis=1)
        near_nM = np.argpartition(-row_nN, self.M - 1, axis=1)[:, : self.M]
        order_nM = np.argsort(-np.take_along_axis(row_nN, near_nM, axis=1), axis=1)
        self.token_NM[token_n] = near_nM = np.take_along_axis(near_nM, order_nM, axis=1)
        self.similar_NM[token_n] = np.take_along_axis(row_nN, near_nM, axis=1)
        return row_nN

    def largest_similarity(self, token_a: np.ndarray, token_b: np.ndarray) -> np.ndarray:
        """Of each token of A to one of B, (a,). A list without one of B is made again."""
        is_b_N = np.zeros(self.similar.N, bool)
        is_b_N[token_b] = True
        is_b_aM = is_b_N[self.token_NM[token_a]]
        similar_a: np.ndarray = self.similar_NM[token_a, is_b_aM.argmax(axis=1)]
        missing_m = np.flatnonzero(~is_b_aM.any(axis=1))
        for first in range(0, len(missing_m), BLOCK):
            some_n = missing_m[first : first + BLOCK]
            similar_a[some_n] = self.list_of(token_a[some_n])[:, token_b].max(axis=1)
        return similar_a
