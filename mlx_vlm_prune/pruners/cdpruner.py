"""Keep a diverse set of tokens that are relevant to the prompt.

CDPruner, Zhang et al., NeurIPS 2025, arXiv:2506.10967. A determinantal point process: with
L the cosine similarity of the tokens and r their relevance to the text, scaled to 0 to
1, the kernel is diag(r) L diag(r), and the set of K that makes its determinant large is
found greedily, with one more row of the Cholesky factor in each step.

As the authors' code (github.com/Theia-4869/CDPruner@9541616). Differs: the text is the language
model's embeddings of the prompt's words (theirs is CLIP's text tower, whose sign they turn:
`negative`); relevance is scaled within each image, not over the batch; 1e-6 is added to it after
scaling, theirs before; once the kernel's rank is exhausted the most relevant tokens follow.

Options:
    negative: turn the sign of the relevance, as the authors' code does for CLIP

Shapes: B images, N tokens, K kept, T words, m rows of a block.
"""

from functools import partial

import mlx.core as mx

from .contract import Reduction, Signals, Stage, take
from .numerics import (
    after_step,
    choice_dtype,
    choosing,
    cosine,
    fused,
    noise,
    rounded,
    rounded_cosine,
    scale_to_unit,
    unit,
)
from .rows import cosine_rows

stage = Stage.PROJECTED
needs: dict[str, str | None] = {"text": None}
MOST_ROWS = 256  # of the factor in a block, a power of two
MOST_ON_GPU = 1024  # the same where a launch costs more than writing a block
KEPT = -4.0  # in place of a kept token's score; any other is above -2


def prune(signals: Signals, K: int, *, negative: bool = False) -> Reduction:
    """Keep K. The K steps are one MLX graph, and read one row of the kernel each."""
    with choosing():
        relevance_BN = relevance(signals, negative)
        kernel = cosine_rows(signals.x_BND).then(
            lambda similar_BnN, part_Bn: part_Bn[..., None] * similar_BnN * relevance_BN[:, None],
            relevance_BN,
        )
        own_BN = rounded(mx.square(unit(signals.x_BND)).sum(axis=-1))
        variance_BN = relevance_BN * own_BN * relevance_BN  # given the kept tokens
        score_BN = scores(variance_BN, relevance_BN)
        token_N, factor = mx.arange(kernel.N, dtype=mx.uint32), Factor(K)
        for step in range(1, K + 1):
            i_B1 = mx.argmax(score_BN, axis=-1, keepdims=True)
            row_BN, variance_BN, score_BN = after_keeping(
                i_B1, token_N, take(score_BN, i_B1), (score_BN, variance_BN, relevance_BN),
                kernel.take(i_B1)[:, 0], factor.explained(i_B1),
            )  # fmt: skip
            factor.append(row_BN)
            after_step(step, variance_BN, score_BN)
        index_BK = mx.argsort(score_BN, axis=-1)[:, :K]  # stable: kept ones first
        return Reduction(index_BK, score_BN=relevance_BN)


def scores(variance_BN: mx.array, relevance_BN: mx.array) -> mx.array:
    """The variance; where it is exhausted, the relevance below all variances."""
    return mx.where(variance_BN > noise(), variance_BN, relevance_BN - 2)


@partial(fused, any_shape=False)
def after_keeping(
    i_B1: mx.array, token_N: mx.array, kept_B1: mx.array, state: tuple[mx.array, ...],
    kernel_BN: mx.array, explained_BN: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:  # fmt: skip
    """The factor's row of token i, of score `kept_B1`, and all variances and scores given that
    token too. `state`: scores, variances and relevance before."""
    score_BN, variance_BN, relevance_BN = state
    exhausted = noise()  # the kernel's diagonal is at most 1
    row_BN = (kernel_BN - explained_BN) / mx.sqrt(mx.maximum(kept_B1, exhausted))
    row_BN = mx.where(kept_B1 > exhausted, row_BN, 0)
    variance_BN = variance_BN - mx.square(row_BN)
    is_kept_BN = (token_N == i_B1) | (score_BN == KEPT)
    return row_BN, variance_BN, mx.where(is_kept_BN, KEPT, scores(variance_BN, relevance_BN))


class Factor:
    """Cholesky's factor of K rows, row by row, in blocks.

    In float64 two neighbours of as many rows become one, up to `MOST_ROWS`: so there are few, and a
    row is copied a few times only. In float32, for a GPU, a block has room for `MOST_ON_GPU` rows,
    and is written again with each: one launch, and fewer products.
    """

    def __init__(self, K: int) -> None:
        self.blocks_BmN: list[mx.array] = []
        self.K, self.rows, self.number_m1 = K, 0, mx.arange(min(K, MOST_ON_GPU))[:, None]

    def append(self, row_BN: mx.array) -> None:
        last_BmN, blocks = row_BN[:, None], self.blocks_BmN
        if row_BN.dtype == mx.float64:
            while blocks and blocks[-1].shape[1] == last_BmN.shape[1] < MOST_ROWS:
                last_BmN = mx.concatenate([blocks.pop(), last_BmN], axis=1)
        else:
            m = self.rows % MOST_ON_GPU
            room = self.number_m1[: self.K - self.rows + m]
            block_BmN = blocks.pop() if m else mx.zeros((1, 1, 1))
            last_BmN = with_row(block_BmN, last_BmN, room, self.number_m1[m : m + 1])
        blocks.append(last_BmN)
        self.rows += 1

    def explained(self, i_B1: mx.array) -> mx.array:
        """What the rows so far explain of a row of the kernel, (B, N)."""
        explained_B1N = mx.zeros((len(i_B1), 1, 1), dtype=choice_dtype())
        for block_BmN in self.blocks_BmN:
            part_B1N = take(block_BmN, i_B1, axis=2).swapaxes(1, 2) @ block_BmN
            is_first = block_BmN is self.blocks_BmN[0]
            explained_B1N = part_B1N if is_first else explained_B1N + part_B1N
        return explained_B1N[:, 0]


@fused
def with_row(block_BmN: mx.array, row_B1N: mx.array, number_m1: mx.array, m: mx.array) -> mx.array:
    """A block with row m in its place."""
    return mx.where(number_m1 == m, row_B1N, block_BmN)


def relevance(signals: Signals, negative: bool) -> mx.array:
    """Mean cosine of each token with the prompt's words, scaled to 0 to 1, (B, N)."""
    similar_BNT = cosine(signals.x_BND, signals.text_BTD)
    real_B1T = signals.text_real_BT[:, None]
    mean_BN = mx.where(real_B1T, similar_BNT, 0).sum(axis=-1) / real_B1T.sum(axis=-1)
    return scale_to_unit(rounded_cosine(-mean_BN if negative else mean_BN)) + 1e-6
