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

Shapes: B images, N tokens, K kept, T words, M steps done.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage, take
from .numerics import choice_dtype, choosing, cosine, rounded, scale_to_unit

stage = Stage.PROJECTED
needs: dict[str, str | None] = {"text": None}
EXHAUSTED = 1e-9  # a conditional variance below it is rounding; the kernel's diagonal is at most 1


def prune(signals: Signals, K: int, *, negative: bool = False) -> Reduction:
    """Keep K. The K steps are one MLX graph."""
    with choosing():
        relevance_BN = relevance(signals, negative)
        similar_BNN = cosine(signals.x_BND)
        kernel_BNN = relevance_BN[..., None] * similar_BNN * relevance_BN[:, None]
        B, N, _ = kernel_BNN.shape
        variance_BN = mx.diagonal(kernel_BNN, axis1=1, axis2=2)  # given the kept tokens
        factor_BMN = mx.zeros((B, 0, N), dtype=choice_dtype())  # Cholesky's
        kept, is_left_BN = [], mx.ones((B, N), dtype=mx.bool_)
        for _ in range(K):
            score_BN = mx.where(variance_BN > EXHAUSTED, variance_BN, relevance_BN - 2)
            score_BN = mx.where(is_left_BN, score_BN, -mx.inf)
            i_B1 = mx.argmax(score_BN, axis=-1, keepdims=True)
            kept.append(i_B1)
            is_left_BN = is_left_BN & (mx.arange(N) != i_B1)
            done_B1N = take(factor_BMN, i_B1, axis=2).swapaxes(1, 2) @ factor_BMN
            row_B1N = take(kernel_BNN, i_B1) - done_B1N
            kept_variance_B1 = mx.take_along_axis(variance_BN, i_B1, axis=-1)
            row_BN = row_B1N[:, 0] / mx.sqrt(mx.maximum(kept_variance_B1, EXHAUSTED))
            row_BN = mx.where(kept_variance_B1 > EXHAUSTED, row_BN, 0)
            factor_BMN = mx.concatenate([factor_BMN, row_BN[:, None]], axis=1)
            variance_BN = variance_BN - mx.square(row_BN)
        return Reduction(index_BK=mx.sort(mx.concatenate(kept, axis=1), axis=1))


def relevance(signals: Signals, negative: bool) -> mx.array:
    """Mean cosine of each token with the prompt's words, scaled to 0 to 1, (B, N)."""
    similar_BNT = cosine(signals.x_BND, signals.text_BTD)
    real_B1T = signals.text_real_BT[:, None]
    mean_BN = mx.where(real_B1T, similar_BNT, 0).sum(axis=-1) / real_B1T.sum(axis=-1)
    return scale_to_unit(rounded(-mean_BN if negative else mean_BN)) + 1e-6
