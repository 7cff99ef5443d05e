"""Give each kept token the attention of those that it replaces.

RESTORE, ICML 2026, arXiv:2606.01711: an enhancer for any selector. Dropping tokens takes
attention away from the image; so a kept token, at its own position, gets more of it: the
log of how many tokens it stands for, each less what distance would have taken from it.

Each dropped token counts for the kept one most similar to it (cosine), with the mean of
cos(distance * frequency) over RoPE's frequencies, its decay, at their distance in tokens, never
below 0. That is ours: their code (cvlab-yonsei/RESTORE, commit 9b27e68) was read, and does other
things, none of which is an option here. A selector chooses half of K; the other half are means of
what it dropped, around anchors of high density that are unlike denser ones, each at its members'
median position. A mean gets the log of its number of members, a chosen token nothing; in the first
layer all get log(N / K). While the prompt is read, each row adds log(2 - decay) to its logits of
every row before it, words too, at the distance of the two rows. `nearby` and `decay` vary ours.

Options:
    strength: factor of the added attention; 1 is the paper's
    theta: base of the language model's rotary embedding, above 1
    dims: size of the language model's heads, 2 or more
    decay: whether distance takes from a dropped token's count; else each counts as one
    nearby: a dropped token counts for the kept one next to it in the row, of two the first

Shapes: B images, N tokens, K kept, d head size.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage, segment_sum, take
from .numerics import choosing
from .rows import nearest_slots

stage = Stage.ENHANCER


def attention_bias(
    signals: Signals, kept: Reduction, *, strength: float = 1.0, theta: float = 1e4,
    dims: int = 128, decay: bool = True, nearby: bool = False,
) -> mx.array:  # fmt: skip
    """What is added to the logits of the attention to each kept token, (B, K)."""
    if kept.index_BK is None:
        raise ValueError("slots that are pooled from everywhere replace no tokens of their own")
    if dims < 2 or theta <= 1:
        raise ValueError("dims is at least 2, and theta above 1")
    N = signals.x_BND.shape[1]
    with choosing():
        index_BK = kept.index_BK.astype(mx.int32)
        if nearby:
            distance_BNK = mx.abs(mx.arange(N)[:, None] - index_BK[:, None])
            slot_BN = mx.argmin(distance_BNK, axis=-1).astype(mx.int32)
        else:
            slot_BN = nearest_slots(signals.x_BND, kept.index_BK)[1]
        distance_BN = mx.abs(mx.arange(N) - take(index_BK, slot_BN))
        decay_N = rotary_decay(N, theta, dims) if decay else mx.ones(N)
        decay_BN1 = decay_N[distance_BN][..., None]
        represented_BK = segment_sum(decay_BN1, slot_BN, kept.slots)[..., 0]
        return strength * mx.log(mx.maximum(represented_BK, 1.0))


def rotary_decay(N: int, theta: float, dims: int) -> mx.array:
    """What distances 0 to N - 1 leave of a score: the mean of RoPE's cosines, (N,)."""
    rate_h = theta ** (-mx.arange(0, dims, 2) / dims)
    return mx.maximum(mx.cos(mx.arange(N)[:, None] * rate_h).mean(axis=-1), 0)
