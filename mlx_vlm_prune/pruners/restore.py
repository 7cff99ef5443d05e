"""Give each kept token the attention of those that it replaces.

RESTORE, ICML 2026, arXiv:2606.01711: an enhancer for any selector. Dropping tokens takes
attention away from the image; so a kept token, at its own position, gets more of it: the
log of how many tokens it stands for, each less what distance would have taken from it.

By default, which is ours and not the authors' way, a selector chooses all K. Each dropped token
counts for the kept one most similar to it (cosine), with the mean of cos(distance * frequency) over
RoPE's frequencies, its decay, at their distance in tokens, never below 0. `decay` and `nearby` vary
that. The answer's tokens add it, too.

With `published` the selector chooses half of K, rounded down. The other half are means of what it
dropped: anchors are the tokens with the highest density (sum of cosines to the others) times
1 - their highest cosine to a less dense one, others join the most similar anchor, and a mean stands
at the median position of its members. A mean gets the log of their number, in the first layer all
get log(N / K), and each row of the prompt, words too, adds log(2 - decay) for every row before it,
at the distance of their positions. The answer's tokens add nothing.

As the authors' code (github.com/cvlab-yonsei/RESTORE@9b27e68) with `published=True`, also where the
anchors' names there speak of denser tokens. Differs: the tokens are those that the selector reads,
where theirs are after the projector (a selector at the end of the tower reads them before it); of
K = 1 the selector's token stays, where theirs is the mean of all; with `published` a selector that
merges, or works inside the tower or the language model, is refused; `published` is refused in
mlx-vlm's models, whose layers share a mask.

Options:
    strength: factor of the added attention; 1 is the paper's
    theta: base of a rotary embedding, above 1: 1e4 whatever the language model's own, as in theirs
    dims: size of the heads that it turns, 2 to 1024: 128 whatever the model's, as in theirs
    decay: whether distance counts; else a dropped token counts as one, and rows add nothing
    nearby: a dropped token counts for the kept one next to it in the row, of two the first
    published: as the authors' code does: half of K are means of what the selector drops

Shapes: B images, N tokens, K kept, R dropped, n of them, M means, d head size, P positions.
"""

from math import log

import mlx.core as mx

from .contract import Reduction, Signals, Stage, segment_sum, take
from .numerics import choosing, keep_highest, keep_marked, mask_of, rounded
from .rows import cosine_rows, nearest_slots

stage = Stage.ENHANCER
MOST_DIMS = 1024  # of a head


def calibrates(*, published: bool = False, nearby: bool = False) -> bool:
    """Are biases those of the prompt alone?"""
    if published and nearby:
        raise ValueError("nearby is no part of published")
    return published


def selected(K: int, *, published: bool = False) -> int:
    """How many of K slots the selector chooses."""
    return max(1, K // 2) if published else K


def complete(signals: Signals, kept: Reduction, K: int) -> Reduction:
    """The tokens that a selector chose, and means of the others: K slots."""
    if kept.merges or kept.index_BK is None:
        raise ValueError("published adds means of dropped tokens to a selector that merges none")
    N, chosen = signals.x_BND.shape[1], kept.slots
    with choosing():
        is_chosen_BN = mask_of(kept.index_BK, N)
        rest_BR = mx.argsort(is_chosen_BN, axis=-1)[:, : N - chosen].astype(mx.int32)
        x_BRD = take(signals.x_BND, rest_BR)
        slot_BR = nearest_slots(x_BRD, anchors(x_BRD, K - chosen))[1]
        median_BM = take(rest_BR, median_members(slot_BR, K - chosen))
        token_BN = mx.broadcast_to(mx.arange(N, dtype=mx.int32), is_chosen_BN.shape)
        home_BN = mx.put_along_axis(token_BN, rest_BR, take(median_BM, slot_BR), axis=1)
        is_kept_BN = is_chosen_BN | mask_of(median_BM, N)
        slot_BN = take(mx.cumsum(is_kept_BN, axis=1) - 1, home_BN)
        return Reduction.merge(keep_marked(is_kept_BN, K), slot_BN)


def anchors(x_BRD: mx.array, M: int) -> mx.array:
    """The M tokens that are dense and unlike all less dense ones, (B, M) ascending."""
    similar, first = cosine_rows(x_BRD), 0
    density_BR = similar.summed_up(lambda similar_BnR: rounded(similar_BnR.mean(axis=-1)))

    def nearest_less_dense(similar_BnR: mx.array) -> mx.array:
        nonlocal first
        density_Bn1 = density_BR[:, first : first + similar_BnR.shape[1], None]
        first += similar_BnR.shape[1]
        return mx.where(density_BR[:, None] < density_Bn1, similar_BnR, -2).max(axis=-1)

    nearest_BR = similar.summed_up(nearest_less_dense)
    unlike_BR = 1 - mx.where(nearest_BR == -2, 0, nearest_BR)
    return keep_highest(rounded(density_BR * unlike_BR), M)


def median_members(slot_BR: mx.array, M: int) -> mx.array:
    """Of each slot the token in the middle of its members, of two the first, (B, M)."""
    count_BM = segment_sum(mx.ones((*slot_BR.shape, 1)), slot_BR, M)[..., 0].astype(mx.int32)
    middle_BM = mx.cumsum(count_BM, axis=1) - count_BM + (count_BM - 1) // 2
    return take(mx.argsort(slot_BR, axis=-1).astype(mx.int32), middle_BM)


def attention_bias(
    signals: Signals, kept: Reduction, *, strength: float = 1.0, theta: float = 1e4,
    dims: int = 128, decay: bool = True, nearby: bool = False,
) -> mx.array:  # fmt: skip
    """What is added to the logits of the attention to each kept token, (B, K).

    A token that others merged into, or left for, inside the tower counts as all of them.
    """
    if kept.index_BK is None:
        raise ValueError("slots that are pooled from everywhere replace no tokens of their own")
    check_rotation(theta, dims)
    N = signals.x_BND.shape[1]
    with choosing():
        index_BK = kept.index_BK.astype(mx.int32)
        if nearby:
            distance_BNK = mx.abs(mx.arange(N)[:, None] - index_BK[:, None])
            slot_BN = mx.argmin(distance_BNK, axis=-1).astype(mx.int32)
        else:
            slot_BN = nearest_slots(signals.x_BND, kept.index_BK)[1]
        distance_BN = mx.abs(mx.arange(N) - take(index_BK, slot_BN))
        decay_N = mx.maximum(rotary_decay(N, theta, dims), 0) if decay else mx.ones(N)
        weight_BN = decay_N[distance_BN]
        patches_BN = signals.get("represented_BN")
        weight_BN = weight_BN if patches_BN is None else weight_BN * patches_BN
        represented_BK = segment_sum(weight_BN[..., None], slot_BN, kept.slots)[..., 0]
        return strength * mx.log(mx.maximum(represented_BK, 1.0))


def prompt_bias(signals: Signals, kept: Reduction, *, strength: float = 1.0) -> mx.array:
    """While a prompt is read: what is added to the attention to each slot, (B, K)."""
    return strength * mx.log(kept.sizes(mx.ones(signals.x_BND.shape[:2])))


def calibration(
    N: int, K: int, positions: int, *, strength: float = 1.0, theta: float = 1e4,
    dims: int = 128, decay: bool = True,
) -> tuple[float, mx.array]:  # fmt: skip
    """While a prompt is read: what is added in the first layer to the attention that each of K of
    N tokens gets, and in all layers by the distance of two rows, (P,)."""
    check_rotation(theta, dims)
    decay_P = rotary_decay(positions, theta, dims) if decay else mx.ones(positions)
    return strength * log(N / K), strength * mx.log(2 - decay_P)


def check_rotation(theta: float, dims: int) -> None:
    """Raise ValueError for a rotary embedding that there is not."""
    if not 2 <= dims <= MOST_DIMS or theta <= 1:
        raise ValueError(f"dims is 2 to {MOST_DIMS}, and theta above 1")


def rotary_decay(N: int, theta: float, dims: int) -> mx.array:
    """What distances 0 to N - 1 leave of a score: the mean of RoPE's cosines, (N,)."""
    rate_h = theta ** (-mx.arange(0, dims, 2) / dims)
    return mx.cos(mx.arange(N)[:, None] * rate_h).mean(axis=-1)
