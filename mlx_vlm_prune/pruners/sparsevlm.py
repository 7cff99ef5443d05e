"""Keep the tokens that the words about the image attend to, and cluster the best of the others.

SparseVLM, Zhang et al., ICML 2025, arXiv:2410.04417. Raters are the words after the image whose
share of a softmax over them, averaged over the visual tokens, is above the mean: by products of
embeddings where they enter the language model. Layers 2, 6 and 15 (of 32, counted from 0) run in
full; then (budgets as 300 : 200 : 110) the score of a token is the attention that the raters paid
to it there, the mean over heads. Of what is dropped the best 30 % and one more are clustered by
density peaks, a cluster for every 10 and one more; its mean goes on in place of its centre.
Positions are renumbered.

As the authors' code (github.com/Gumpest/SparseVLMs@26a5f48, its version 1.0). Their paper says
sums of clusters: `sums=True`. Differs: K counts clusters too, theirs come on top of it, and of two
ways to split K more tokens stay as they are; a cluster stands at its centre's place, theirs behind
the kept tokens; where no word is above the mean all are raters; no noise breaks ties, as theirs
does; any batch; for budgets of 128 and 64 theirs has lists in other proportions.

Options:
    recycle: share of the dropped tokens that is clustered, 0 to 1; 0 clusters none
    sums: whether a cluster's sum goes on, as the paper says, in place of its mean

Shapes: B images, N tokens, K kept, T words, C clusters, n recycled tokens, k kept unchanged, D
features.
"""

from dataclasses import replace

import mlx.core as mx

from .budget import several_cuts
from .clusters import density_peaks, distances, nearest_centres
from .contract import Reduction, Signals, Stage, take
from .numerics import choosing, mask_of, rounded, to_choice_dtype

stage = Stage.DECODER
needs: dict[str, str | None] = {"text_attention": None, "text_share": None}
positions = "renumber"
CUTS, SHARES = (3 / 32, 7 / 32, 16 / 32), (1, 200 / 300, 110 / 300)


def schedule(layers: int, N: int, K: int) -> dict[int, int]:
    """Three cuts in the paper's proportions, none of more than N."""

    def counts(t: float) -> list[int]:
        return [min(N, max(1, int(N * t * share / SHARES[-1]))) for share in SHARES]

    return several_cuts(layers, N, K, CUTS, counts)


def prune(signals: Signals, K: int, *, recycle: float = 0.3, sums: bool = False) -> Reduction:
    """Keep the highest scores, and clusters of the highest of the others, K together."""
    if not 0 <= recycle <= 1:
        raise ValueError(f"recycle is {recycle}; it is a share from 0 to 1")
    with choosing():
        score_BN = rounded(rater_attention(signals))
        kept = recycle_best_dropped(score_BN, signals.x_BND, K, recycle)
        if not sums:
            assert kept.index_BK is not None and kept.slot_BN is not None
            kept = Reduction.merge(kept.index_BK, kept.slot_BN)
        return replace(kept, score_BN=score_BN)


def rater_attention(signals: Signals) -> mx.array:
    """The mean attention that the raters pay to each token, (B, N)."""
    real_BT = signals.text_real_BT
    share_BT = mx.where(real_BT, rounded(signals.text_share_BT), 0)
    mean_B1 = share_BT.sum(axis=-1, keepdims=True) / real_BT.sum(axis=-1, keepdims=True)
    rater_BT = (share_BT > rounded(mean_B1)) & real_BT
    rater_BT = mx.where(rater_BT.any(axis=-1, keepdims=True), rater_BT, real_BT)
    rated_BTN = to_choice_dtype(signals.text_attention_BTN) * rater_BT[..., None]
    return rated_BTN.sum(axis=1) / rater_BT.sum(axis=-1, keepdims=True)


def recycle_best_dropped(score_BN: mx.array, x_BND: mx.array, K: int, recycle: float) -> Reduction:
    """Kept tokens, and the sums of clusters of dropped ones."""
    N = score_BN.shape[1]
    k, recycled, C = split_budget(N, K, recycle)
    order_BN = mx.argsort(-score_BN, axis=-1)
    index_BK, home_BN = order_BN[:, :k], mx.broadcast_to(mx.arange(N), score_BN.shape)
    if C:
        best_Bn = mx.sort(order_BN[:, k : k + recycled], axis=-1)
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


def split_budget(N: int, K: int, recycle: float) -> tuple[int, int, int]:
    """How many of N tokens stay unchanged, how many of the others are recycled, and in how many
    clusters, so that K slots are left."""
    for k in range(K, 0, -1):
        recycled = int(recycle * (N - k)) + 1 if recycle else 0
        C = recycled // 10 + 1 if recycled else 0
        if k + C <= K or k == 1:
            return k, min(recycled, N - k), min(C, K - k)
    raise AssertionError("K is at least 1")
