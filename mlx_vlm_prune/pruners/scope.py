"""Keep the tokens that CLS attends to and that the kept ones do not cover yet.

SCOPE, Deng et al., NeurIPS 2025, arXiv:2510.24214. A token u is covered as well as its most
similar kept token covers it. Greedily, the next token is the one with the largest gain
in coverage, summed over the image, times its saliency (CLS attention) to the `power`.

Options:
    power: exponent of the CLS attention; 0 leaves coverage alone
    layer: number of the tower's layer that is read; -1 is the last

Shapes: B images, N tokens, K kept.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage, take
from .numerics import choice_dtype, choosing, constant, cosine, rounded, to_choice_dtype

stage = Stage.PROJECTED
needs = {"cls_attention": "layer"}


def prune(signals: Signals, K: int, *, power: float = 1.0, layer: float = -1) -> Reduction:
    """Keep K; `layer` is read by the host."""
    with choosing():
        similar_BNN = cosine(signals.x_BND)
        salient_BN = mx.power(to_choice_dtype(signals.cls_attention_BN), constant(power))
        return Reduction(index_BK=greedy_cover(similar_BNN, salient_BN, K))


def greedy_cover(similar_BMN: mx.array, salient_BN: mx.array, K: int) -> mx.array:
    """K columns (B, K), ascending, that greedily cover the M rows. One MLX graph.

    A row is covered by its largest entry among the chosen columns. A column's gain is what it
    adds to that, summed over the rows, times its saliency.
    """
    B, M, N = similar_BMN.shape
    covered_BM1 = mx.zeros((B, M, 1), dtype=choice_dtype())
    kept, is_left_BN = [], mx.ones((B, N), dtype=mx.bool_)
    for _ in range(K):
        gain_BN = mx.maximum(similar_BMN - covered_BM1, 0).sum(axis=1)
        score_BN = mx.where(is_left_BN, rounded(gain_BN) * salient_BN, -1)
        i_B1 = mx.argmax(score_BN, axis=-1, keepdims=True)
        kept.append(i_B1)
        is_left_BN = is_left_BN & (mx.arange(N) != i_B1)
        covered_BM1 = mx.maximum(covered_BM1, take(similar_BMN, i_B1, axis=2))
    return mx.sort(mx.concatenate(kept, axis=1), axis=1)
