"""Keep a diverse set of tokens that are relevant to the prompt.

CDPruner, Zhang et al., NeurIPS 2025, arXiv:2506.10967. A determinantal point process: with
L the cosine similarity of the tokens and r their relevance to the text, scaled to 0 to
1, the kernel is diag(r) L diag(r), and the set of K that makes its determinant large is
found greedily, with one more row of the Cholesky factor in each step.

Differs from the authors' code: the text is the language model's embeddings of the prompt's
words (theirs is CLIP's text tower, whose sign they turn: `negative`), relevance is
scaled within each image, not over the batch, and once the kernel's rank is exhausted
the most relevant tokens follow.

Options:
    negative: turn the sign of the relevance, as the authors' code does for CLIP

Shapes: B images, N tokens, K kept, T words, m rows of a block.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage, take
from .numerics import (
    after_step,
    choosing,
    cosine,
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


def prune(signals: Signals, K: int, *, negative: bool = False) -> Reduction:
    """Keep K. The K steps are one MLX graph, and read one row of the kernel each."""
    with choosing():
        relevance_BN = relevance(signals, negative)
        similar, factor = cosine_rows(signals.x_BND), Factor()
        own_BN = rounded(mx.square(unit(signals.x_BND)).sum(axis=-1))
        variance_BN = relevance_BN * own_BN * relevance_BN  # given the kept tokens
        kept, token_N = [], mx.arange(relevance_BN.shape[1])
        exhausted = noise()  # the kernel's diagonal is at most 1
        is_left_BN = mx.ones(relevance_BN.shape, dtype=mx.bool_)
        for _ in range(K):
            score_BN = mx.where(variance_BN > exhausted, variance_BN, relevance_BN - 2)
            i_B1 = mx.argmax(mx.where(is_left_BN, score_BN, -mx.inf), axis=-1, keepdims=True)
            kept.append(i_B1)
            is_left_BN = is_left_BN & (token_N != i_B1)
            kernel_BN = take(relevance_BN, i_B1) * similar.take(i_B1)[:, 0] * relevance_BN
            kept_variance_B1 = take(variance_BN, i_B1)
            row_BN = factor.residual(kernel_BN, i_B1)
            row_BN = row_BN / mx.sqrt(mx.maximum(kept_variance_B1, exhausted))
            row_BN = mx.where(kept_variance_B1 > exhausted, row_BN, 0)
            factor.append(row_BN)
            variance_BN = variance_BN - mx.square(row_BN)
            after_step(len(kept), variance_BN)
        return Reduction(index_BK=mx.sort(mx.concatenate(kept, axis=1), axis=1))


class Factor:
    """Cholesky's factor, row by row, in blocks. Two neighbours of as many rows become one, up to
    `MOST_ROWS`: so there are few, and a row is copied a few times only."""

    def __init__(self) -> None:
        self.blocks_BmN: list[mx.array] = []

    def append(self, row_BN: mx.array) -> None:
        last_BmN, blocks = row_BN[:, None], self.blocks_BmN
        while blocks and blocks[-1].shape[1] == last_BmN.shape[1] < MOST_ROWS:
            last_BmN = mx.concatenate([blocks.pop(), last_BmN], axis=1)
        blocks.append(last_BmN)

    def residual(self, kernel_BN: mx.array, i_B1: mx.array) -> mx.array:
        """A row of the kernel less what the rows so far explain of it, (B, N)."""
        explained_B1N = mx.zeros_like(kernel_BN[:, None])
        for block_BmN in self.blocks_BmN:
            explained_B1N += take(block_BmN, i_B1, axis=2).swapaxes(1, 2) @ block_BmN
        return kernel_BN - explained_B1N[:, 0]


def relevance(signals: Signals, negative: bool) -> mx.array:
    """Mean cosine of each token with the prompt's words, scaled to 0 to 1, (B, N)."""
    similar_BNT = cosine(signals.x_BND, signals.text_BTD)
    real_B1T = signals.text_real_BT[:, None]
    mean_BN = mx.where(real_B1T, similar_BNT, 0).sum(axis=-1) / real_B1T.sum(axis=-1)
    return scale_to_unit(rounded_cosine(-mean_BN if negative else mean_BN)) + 1e-6
