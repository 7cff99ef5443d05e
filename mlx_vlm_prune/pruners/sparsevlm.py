"""Keep the tokens that the words about the image attend to, and cluster the best of the others.

SparseVLM, Zhang et al., ICML 2025, arXiv:2410.04417. Raters are the words whose share of a
softmax over words, averaged over the visual tokens, is above the mean. At three depths
(2, 6 and 15 of 32, budgets as 300 : 200 : 110) the score of a token is the attention
that the raters pay to it, the mean over heads. Of what is dropped the best 30 % are
clustered by density peaks, and each cluster's sum goes on in place of its centre.
Positions are renumbered.

Differs from the authors' code: raters are judged anew at each cut, by hidden states; a
cluster stands at its centre's place; any batch.

Options:
    recycle: share of the dropped tokens that is clustered, 0 to 1

Shapes: B images, N tokens, K kept, T words, C clusters, n recycled tokens, D features.
"""

import mlx.core as mx

from .budget import several_cuts
from .clusters import density_peaks, distances, nearest_centres
from .contract import Reduction, Signals, Stage, take
from .numerics import choosing, mask_of, rounded, softmax, to_choice_dtype

stage = Stage.DECODER
needs: dict[str, str | None] = {"text_attention": None, "normed": None}
positions = "renumber"
CUTS, SHARES = (2 / 32, 6 / 32, 15 / 32), (1, 200 / 300, 110 / 300)


def schedule(layers: int, N: int, K: int) -> dict[int, int]:
    """Three cuts in the paper's proportions, none of more than N."""

    def counts(t: float) -> list[int]:
        return [min(N, max(1, int(N * t * share / SHARES[-1]))) for share in SHARES]

    return several_cuts(layers, N, K, CUTS, counts)


def prune(signals: Signals, K: int, *, recycle: float = 0.3) -> Reduction:
    """Keep the highest scores, and clusters of the highest of the others, K together."""
    if not 0 <= recycle <= 1:
        raise ValueError(f"recycle is {recycle}; it is a share from 0 to 1")
    with choosing():
        score_BN = rounded(rater_attention(signals))
        return recycle_best_dropped(score_BN, signals.x_BND, K, recycle)


def rater_attention(signals: Signals) -> mx.array:
    """The mean attention that the raters pay to each token, (B, N)."""
    real_BT = signals.text_real_BT
    logits_BNT = to_choice_dtype(signals.normed_BND) @ to_choice_dtype(signals.text_BTD).swapaxes(
        1, 2
    )
    logits_BNT = mx.where(real_BT[:, None], logits_BNT, -mx.inf)
    share_BT = rounded(mx.where(real_BT, softmax(logits_BNT).mean(axis=1), 0))
    mean_B1 = share_BT.sum(axis=-1, keepdims=True) / real_BT.sum(axis=-1, keepdims=True)
    rater_BT = (share_BT >= rounded(mean_B1)) & real_BT
    rated_BTN = to_choice_dtype(signals.text_attention_BTN) * rater_BT[..., None]
    return rated_BTN.sum(axis=1) / rater_BT.sum(axis=-1, keepdims=True)


def recycle_best_dropped(score_BN: mx.array, x_BND: mx.array, K: int, recycle: float) -> Reduction:
    """Kept tokens, and the sums of clusters of dropped ones."""
    N = score_BN.shape[1]
    recycled_count = int(recycle * (N - K))
    C = min(recycled_count // 10 + 1, K - 1) if recycled_count else 0
    order_BN = mx.argsort(-score_BN, axis=-1)
    index_BK, home_BN = order_BN[:, : K - C], mx.broadcast_to(mx.arange(N), score_BN.shape)
    if C:
        best_Bn = mx.sort(order_BN[:, K - C : K - C + max(recycled_count, C)], axis=-1)
        distance_Bnn = distances(take(x_BND, best_Bn))
        centre_BC = density_peaks(distance_Bnn, C)
        home_Bn = take(best_Bn, nearest_centres(distance_Bnn, centre_BC))
        home_BN = mx.put_along_axis(home_BN, best_Bn, home_Bn.astype(home_BN.dtype), axis=1)
        index_BK = mx.concatenate([index_BK, take(best_Bn, centre_BC)], axis=1)
    index_BK = mx.sort(index_BK, axis=1)
    is_slot_BN = mask_of(index_BK, N)
    slot_BN = take(mx.cumsum(is_slot_BN, axis=1) - 1, home_BN)
    is_mixed_BN = take(is_slot_BN, home_BN)
    slot_BN = mx.where(is_mixed_BN, slot_BN, -1)
    return Reduction(index_BK, slot_BN=slot_BN, share_BN=is_mixed_BN.astype(mx.float32))
