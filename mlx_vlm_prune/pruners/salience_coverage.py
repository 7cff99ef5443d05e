"""Keep the tokens that others attend to and that are unlike those kept already.

SCoRe (Salience-Coverage Reduction), CVPR 2026, cvpr.thecvf.com/virtual/2026/poster/39155: a
weighted k-center problem, solved greedily. The first token kept is the one with the highest
attention a; each next one has the highest product of its distance to the nearest kept token,
1 - cos, and a to the `power`.

No code of the authors is public. Their attention is that of CLS or what a token receives from all
others; here the latter, which every tower has.

Options:
    power: exponent of the attention; 0 leaves diversity alone, 0.8 is the paper's
    layer: number of the tower's layer that is read; -1 is the last

Shapes: B images, N tokens, K kept.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage
from .divprune import KEPT, gaps_after
from .numerics import after_step, choosing, constant, fused, to_choice_dtype
from .rows import cosine_rows

stage = Stage.FEATURES
needs = {"received_attention": "layer"}


def prune(signals: Signals, K: int, *, power: float = 0.8, layer: float = -1) -> Reduction:
    """Keep K; `layer` is read by the host."""
    if power < 0:
        raise ValueError(f"power is {power:g}; it is at least 0")
    with choosing():
        support_BN = mx.power(to_choice_dtype(signals.received_attention_BN), constant(power))
        return Reduction(index_BK=weighted_centres(signals.x_BND, support_BN, K))


def weighted_centres(x_BND: mx.array, support_BN: mx.array, K: int) -> mx.array:
    """Indices (B, K): the token with the most support, then one after another those with the
    highest product of support and distance to the nearest kept token. Called under `choosing()`."""
    similar = cosine_rows(x_BND)
    score_BN, gap_BN = support_BN, mx.full(support_BN.shape, 4, dtype=support_BN.dtype)
    token_N = mx.arange(score_BN.shape[1], dtype=mx.uint32)
    for step in range(1, K + 1):
        i_B1 = mx.argmax(score_BN, axis=-1, keepdims=True)
        gap_BN = gaps_after(gap_BN, similar.take(i_B1)[:, 0], i_B1, token_N)
        score_BN = supported(gap_BN, support_BN)
        after_step(step, gap_BN, score_BN)
    return mx.argsort(gap_BN, axis=-1)[:, :K]  # stable: kept ones first


@fused
def supported(gap_BN: mx.array, support_BN: mx.array) -> mx.array:
    """The score of every token that is not kept yet."""
    return mx.where(gap_BN == KEPT, KEPT, mx.maximum(gap_BN, 0) * support_BN)
