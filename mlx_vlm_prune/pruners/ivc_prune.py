"""Inside the language model, keep its coordinates and the tokens whose values are like the words'.

IVC-Prune, Sun et al., ICLR 2026, arXiv:2602.03060. Between two layers three sets of tokens stay.
Anchors, by positions alone: see `ivc`. Seeds, the hundredth of the tokens to which the words after
the image are most alike: by a softmax over the image of the products of their values in the layer
before, the mean over heads and words; values carry no position. And as many as K leaves over of
those to which words and seeds together are most alike.

As the authors' code (github.com/FireRedTeam/IVC-Prune@03afd9c) for Qwen2.5-VL, where half of the
tokens stay; their other models have other shares. Differs: K is the budget of the average layer,
and the layers before the cut hold all tokens, where theirs drops these from the earlier layers'
caches once the prompt is read; the shares of anchors are of K; every word after the image counts,
where the first two rows behind it do not; where anchors and seeds are more than K, the best by
their order stay, seeds first; any number of images.

Options:
    layer: layer of the language model before which tokens leave; below 1 a share of the depth: the
        authors have 2 of 28 for Qwen2-VL and about the half for others, of whose layers then one
        half hold all tokens
    anchors: share of K that are anchors by cosines, and by sines, 0 to 0.5
    seeds: share of the tokens that are seeds, 0 to 1; one at least

Shapes: B images, N tokens, K kept, S seeds, T words, t of them, H heads, d head size.
"""

import mlx.core as mx

from .budget import one_cut
from .contract import Reduction, Signals, Stage, take
from .ivc import anchor_ranks
from .numerics import choosing, keep_highest, mask_of, rounded, softmax, to_choice_dtype

stage = Stage.DECODER
needs: dict[str, str | None] = {"held_values": None, "rotation": None}
ROWS_AT_ONCE = 64  # whose likeness to all tokens is held


def schedule(layers: int, N: int, K: int, *, layer: float = 0.07) -> dict[int, int]:
    """One cut."""
    return one_cut(layers, N, K, layer)


def prune(signals: Signals, K: int, *, anchors: float = 0.2, seeds: float = 0.01) -> Reduction:
    """Keep K: seeds, anchors, and what is most like the words and the seeds."""
    if not (0 <= anchors <= 0.5 and 0 <= seeds <= 1):
        raise ValueError("anchors is a share of K from 0 to 0.5, and seeds of all tokens, 0 to 1")
    with choosing():
        N, values_BNHd = signals.x_BND.shape[1], to_choice_dtype(signals.held_values_BNHd)
        words_BTHd = to_choice_dtype(signals.text_values_BTHd)
        is_real_BT = to_choice_dtype(signals.text_real_BT)
        by_words_BN = summed_likeness(words_BTHd, values_BNHd, is_real_BT)
        seed_BS = keep_highest(rounded(by_words_BN), max(1, round(N * seeds)))
        is_seed_BS = mx.ones(seed_BS.shape, dtype=values_BNHd.dtype)
        by_seeds_BN = summed_likeness(take(values_BNHd, seed_BS), values_BNHd, is_seed_BS)
        rows_B1 = is_real_BT.sum(axis=1, keepdims=True) + seed_BS.shape[1]
        like_BN = (by_words_BN + by_seeds_BN) / rows_B1  # at most 1
        is_anchor_BN = anchor_ranks(signals) < round(K * anchors)
        first_BN = 2 * mask_of(seed_BS, N) + is_anchor_BN
        score_BN = rounded(like_BN + 2 * first_BN.astype(like_BN.dtype))
        return Reduction(keep_highest(score_BN, K), score_BN=score_BN)


def summed_likeness(rows_BTHd: mx.array, values_BNHd: mx.array, is_real_BT: mx.array) -> mx.array:
    """The sum over rows of a softmax of their products with all values, the mean over heads,
    (B, N)."""
    values_BHdN, total = values_BNHd.transpose(0, 2, 3, 1), mx.array(0.0)
    for first in range(0, rows_BTHd.shape[1], ROWS_AT_ONCE):
        some = slice(first, first + ROWS_AT_ONCE)
        logits_BHtN = rows_BTHd[:, some].swapaxes(1, 2) @ values_BHdN
        share_BtN = softmax(logits_BHtN / rows_BTHd.shape[-1] ** 0.5).mean(axis=1)
        total = total + (share_BtN * is_real_BT[:, some, None]).sum(axis=1)
    return total
