"""Keep what is attended and diverse in each frame; merge the rest over time, then in space.

FlashVID, ICLR 2026, arXiv:2602.08024. A clip is cut where the means of two neighbouring frames
differ, and at least into `segments` parts. Every frame keeps a share `alpha` of its budget by
attention times the distance, 1 - cos, to the nearest kept token. Each other token joins the most
similar other one of the frame before in its segment, if that is similar enough: a tree over frames,
whose root is its mean. The roots of each frame are clustered by density peaks, down to what is left
of the segment's budget; a slot is the mean of its roots. With three tokens a frame or fewer nothing
merges by default.

As the authors' code (github.com/Fanziyang-v/FlashVID@1d37422) on the same attention, where their
frames keep K together. Differs: K is met, spread evenly over the frames; a frame's clusters are its
share of its segment's roots by largest remainders, where theirs rounds each up, and where it has
none, its roots are dropped; trees end as soon as no more roots are left than slots, where theirs
leaves one more; a tree's root is the mean of all its tokens, where theirs divides the sum by the
root and its own branches alone; a segment of one frame clusters the tokens that are not kept yet,
where theirs clusters those that are, too; ties go to the lower index, where theirs adds noise to
densities; in Qwen3-VL the features of early layers are mixed, too. Their last step, inside the
language model, is left out.

Options:
    alpha: share of a frame's budget that is chosen, not merged, 0 to 1
    cut: cosine of two frames' means below which the clip is cut, -1 to 1
    merge: cosine above which a token joins one of the frame before, -1 to 1
    segments: parts of the clip, at least, where it has as many frames; 1 or more
    layer: number of the tower's layer whose attention is read; -1 is the last

Shapes: B clips, T frames of n tokens, N = Tn, K kept, D features, F frames of all clips.
"""

import math

import mlx.core as mx

from .clusters import distance_rows, peak_scores
from .contract import Reduction, Signals, Stage, segment_sum, take
from .divprune import KEPT, gaps_after
from .numerics import (
    after_step,
    choice_dtype,
    choosing,
    compute_on_cpu,
    constant,
    keep_marked,
    rounded,
    rounded_cosine,
    to_choice_dtype,
    unit,
)
from .rows import MOST_HELD, NOBODY, cosine_rows, nearest, nearest_similarity

stage = Stage.PROJECTED
needs: dict[str, str | None] = {"received_attention": "layer", "grid": None}
reads_frames = True
NEIGHBOURS = 7  # that a density is of


def prune(
    signals: Signals, K: int, *, alpha: float = 0.7, cut: float = 0.9, merge: float = 0.8,
    segments: int = 8, layer: float = -1,
) -> Reduction:  # fmt: skip
    """Merge into K; `layer` is read by the host."""
    check_options(alpha, cut, merge, segments)
    T, (B, N, D) = signals.frames, signals.x_BND.shape
    budget = [(t + 1) * K // T - t * K // T for t in range(T)]
    chosen = [math.ceil(alpha * k - 1e-9) for k in budget]
    clusters = [k - some for k, some in zip(budget, chosen, strict=True)]
    with choosing():
        x_BTnD = to_choice_dtype(signals.x_BND).reshape(B, T, N // T, D)
        attention_BTn = to_choice_dtype(signals.received_attention_BN).reshape(B, T, -1)
        is_chosen_BTn = attended_and_diverse(x_BTnD, attention_BTn, chosen)
        if not any(clusters):
            return Reduction(keep_marked(is_chosen_BTn.reshape(B, N), K))
        first_BT = first_frames(x_BTnD, cut, segments)
        tree_BN, is_root_BTn = trees(x_BTnD, is_chosen_BTn, first_BT, merge, clusters)
        size_BN = segment_sum(mx.ones((B, N, 1), x_BTnD.dtype), tree_BN, N)[..., 0]
        sum_BND = segment_sum(x_BTnD.reshape(B, N, D), tree_BN, N)
        root_BND = sum_BND / mx.maximum(size_BN, 1)[..., None]
        count_BT = largest_remainders(is_root_BTn.sum(axis=-1), first_BT, clusters)
        R = N // T - min(chosen)  # roots of a frame, at most
        if choice_dtype() == mx.float64:
            R = int(is_root_BTn.sum(axis=-1).max())
        home_BN, is_centre_BN = peaks(root_BND, is_root_BTn, count_BT, R)
        is_kept_BN = is_centre_BN | is_chosen_BTn.reshape(B, N)
        return mean_of_roots(is_kept_BN, tree_BN, home_BN, size_BN, is_root_BTn.reshape(B, N), K)


def check_options(alpha: float, cut: float, merge: float, segments: int) -> None:
    """Raises ValueError for one out of range."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha:g}; it must be from 0 to 1")
    for name, value in (("cut", cut), ("merge", merge)):
        if not -1 <= value <= 1:
            raise ValueError(f"{name} is {value:g}; it is a cosine, from -1 to 1")
    if segments < 1:
        raise ValueError(f"segments is {segments}; it must be 1 or more")


def attended_and_diverse(
    x_BTnD: mx.array, attention_BTn: mx.array, count: list[int]
) -> mx.array:  # fmt: skip
    """Which tokens each frame chooses, (B, T, n): `count` of them, one after another."""
    B, T, n, _ = x_BTnD.shape
    similar = cosine_rows(x_BTnD.reshape(B * T, n, -1))
    weight_Fn = attention_BTn.reshape(B * T, n)
    score_Fn = rounded(weight_Fn * (1 - nearest_similarity(similar)))
    gap_Fn = mx.full(score_Fn.shape, 4, dtype=score_Fn.dtype)  # to the nearest chosen token
    token_n = mx.arange(n, dtype=mx.uint32)
    for step in range(1, max(count) + 1):
        i_F1, mark = mx.argmax(score_Fn, axis=-1, keepdims=True), constant(KEPT * step)
        gap_Fn = gaps_after(gap_Fn, similar.take(i_F1)[:, 0], i_F1, token_n, mark)
        score_Fn = mx.where(gap_Fn <= KEPT, gap_Fn, rounded(weight_Fn * gap_Fn))
        after_step(step, gap_Fn, score_Fn)
    gap_BTn = gap_Fn.reshape(B, T, n)
    return (gap_BTn <= KEPT) & (gap_BTn >= KEPT * mx.array(count)[:, None])


def first_frames(x_BTnD: mx.array, cut: float, segments: int) -> mx.array:
    """The number of the first frame of each frame's segment, (B, T)."""
    B, T = x_BTnD.shape[:2]
    if T == 1:  # MLX 0.31.0 crashes when it sorts an empty array
        return mx.zeros((B, 1), mx.int32)
    mean_BTD = unit(x_BTnD.mean(axis=2))
    alike_Bt = rounded_cosine((mean_BTD[:, 1:] * mean_BTD[:, :-1]).sum(axis=-1))
    rank_Bt = mx.argsort(mx.argsort(alike_Bt, axis=-1), axis=-1)
    is_cut_Bt = (alike_Bt < cut) | (rank_Bt < segments - 1)
    frame_t = mx.arange(1, T)
    first_Bt = mx.where(is_cut_Bt, frame_t, 0)
    return mx.cummax(mx.pad(first_Bt, [(0, 0), (1, 0)]), axis=-1)


def trees(
    x_BTnD: mx.array, is_chosen_BTn: mx.array, first_BT: mx.array, merge: float, clusters: list[int]
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """The root of the tree that each token is in, (B, N), its own where it is chosen; and which
    tokens are roots, (B, T, n). Of a segment at least as many are left as it has clusters."""
    B, T, n, _ = x_BTnD.shape
    token_BTn = mx.broadcast_to(mx.arange(T * n).reshape(T, n), (B, T, n))
    best, parent = [mx.full((B, n), NOBODY, dtype=x_BTnD.dtype)], []
    unit_BTnD = unit(x_BTnD)
    for t in range(1, T):
        free_Bn = ~is_chosen_BTn[:, t - 1]
        best_Bn, parent_Bn = nearest(unit_BTnD[:, t], unit_BTnD[:, t - 1], free_Bn)
        best.append(best_Bn)
        parent.append(parent_Bn.astype(mx.int32))
    begins_BT1 = (first_BT == mx.arange(T))[..., None]
    best_BTn = mx.where(is_chosen_BTn | begins_BT1, NOBODY, mx.stack(best, axis=1))
    free_BT = (~is_chosen_BTn).sum(axis=-1)
    room_BT = sum_of_segment(free_BT - mx.array(clusters), first_BT)
    joins_BTn = (best_BTn > merge) & (rank_in_segment(best_BTn, first_BT) < room_BT[..., None])
    roots = [token_BTn[:, 0]]
    for t in range(1, T):
        above_Bn = take(roots[-1], parent[t - 1])
        roots.append(mx.where(joins_BTn[:, t], above_Bn, token_BTn[:, t]))
    return mx.concatenate(roots, axis=1), ~joins_BTn & ~is_chosen_BTn


def sum_of_segment(value_BT: mx.array, first_BT: mx.array) -> mx.array:
    """The sum over the frames of each frame's segment, (B, T)."""
    is_same_BTT = first_BT[..., None] == first_BT[:, None]
    return (is_same_BTT * value_BT[:, None].astype(mx.int64)).sum(axis=-1)


def rank_in_segment(score_BTn: mx.array, first_BT: mx.array) -> mx.array:
    """A token's place among those of its segment, the highest score first, (B, T, n)."""
    B, T, n = score_BTn.shape
    begin_BTn = mx.broadcast_to(first_BT[..., None] * n, (B, T, n))
    begin_BN = begin_BTn.reshape(B, -1)
    order_BN = mx.argsort(-score_BTn.reshape(B, -1), axis=-1)
    order_BN = take(order_BN, mx.argsort(take(begin_BN, order_BN), axis=-1))  # by segments
    return mx.argsort(order_BN, axis=-1).reshape(B, T, n).astype(begin_BTn.dtype) - begin_BTn


def largest_remainders(roots_BT: mx.array, first_BT: mx.array, clusters: list[int]) -> mx.array:
    """How many clusters each frame has, (B, T): its share of its segment's by its roots."""
    all_BT = mx.broadcast_to(mx.array(clusters), roots_BT.shape)
    part_BT = roots_BT.astype(mx.int64) * sum_of_segment(all_BT, first_BT)
    of_BT = mx.maximum(sum_of_segment(roots_BT, first_BT), 1)
    share_BT, rest_BT = part_BT // of_BT, part_BT % of_BT
    left_BT = sum_of_segment(all_BT, first_BT) - sum_of_segment(share_BT, first_BT)
    rank_BT = rank_in_segment(rest_BT[..., None], first_BT)[..., 0]
    return share_BT + (rank_BT < left_BT)


def peaks(
    root_BND: mx.array, is_root_BTn: mx.array, count_BT: mx.array, R: int
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """The centre of each root's cluster within its frame, (B, N), -1 of other tokens and where a
    frame has none; and which tokens are centres, (B, N). Of each frame R tokens are compared."""
    B, T, n = is_root_BTn.shape
    is_root_Fn, count_F1 = is_root_BTn.reshape(B * T, n), count_BT.reshape(B * T, 1)
    place_FR = mx.sort(mx.argsort(~is_root_Fn, axis=-1)[:, :R], axis=-1)
    root_FRD = take(root_BND.reshape(B * T, n, -1), place_FR)
    is_root_FR, at_once, parts = take(is_root_Fn, place_FR), max(1, MOST_HELD // R), []
    for first in range(0, B * T, at_once):
        some = slice(first, first + at_once)
        parts.append(clusters_of(root_FRD[some], is_root_FR[some], count_F1[some]))
        compute_on_cpu(*parts[-1])
    is_centre_FR, home_FR = (mx.concatenate(list(part)) for part in zip(*parts, strict=True))
    home_FR = take(place_FR, home_FR) + (mx.arange(B * T)[:, None] % T * n).astype(mx.uint32)
    home_FR = mx.where(is_root_FR & (count_F1 > 0), home_FR.astype(mx.int32), -1)
    home_Fn = mx.put_along_axis(mx.full((B * T, n), -1), place_FR, home_FR, axis=1)
    is_centre_Fn = mx.put_along_axis(mx.zeros((B * T, n), mx.bool_), place_FR, is_centre_FR, axis=1)
    return home_Fn.reshape(B, -1), is_centre_Fn.reshape(B, -1)


def clusters_of(
    root_FRD: mx.array, is_root_FR: mx.array, count_F1: mx.array
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """Which roots of a frame are centres, those with the highest density, of the nearest roots,
    times distance to a denser one; and of every root the nearest centre, both (F, R)."""
    distance = distance_rows(root_FRD)
    R = is_root_FR.shape[1]
    k, near, farthest, reach, home = min(NEIGHBOURS, R), [], [], [], []
    k_F1 = mx.minimum(count_F1, k)
    for block_FmR in distance.blocks():
        near_Fmk = mx.sort(mx.where(is_root_FR[:, None], block_FmR, mx.inf), axis=-1)[..., :k]
        near_Fmk = mx.where(mx.arange(k) < k_F1[..., None], near_Fmk, 0)
        near.append(mx.square(near_Fmk).sum(axis=-1) / mx.maximum(k_F1, 1))
        farthest.append(mx.where(is_root_FR[:, None], block_FmR, 0).max(axis=-1))
        compute_on_cpu(near[-1], farthest[-1])
    spread_FR = mx.where(is_root_FR, rounded(mx.concatenate(near, axis=1)), mx.inf)
    rank_FR = mx.argsort(mx.argsort(spread_FR, axis=-1), axis=-1)
    for some, block_FmR in distance.numbered_blocks():
        is_denser_FmR = rank_FR[:, None] < rank_FR[:, some, None]
        reach.append(mx.where(is_denser_FmR, block_FmR, mx.inf).min(axis=-1))
        compute_on_cpu(reach[-1])
    far_F1 = mx.where(is_root_FR, mx.concatenate(farthest, axis=1), 0).max(axis=-1, keepdims=True)
    reach_FR = mx.where(rank_FR == 0, far_F1, mx.concatenate(reach, axis=1))
    score_FR = mx.where(is_root_FR, peak_scores(spread_FR, reach_FR), -mx.inf)
    is_centre_FR = mx.argsort(mx.argsort(-score_FR, axis=-1), axis=-1) < count_F1
    for block_FmR in distance.blocks():
        home.append(mx.argmin(mx.where(is_centre_FR[:, None], block_FmR, mx.inf), axis=-1))
        compute_on_cpu(home[-1])
    home_FR = mx.concatenate(home, axis=1)
    own_R = mx.arange(R, dtype=home_FR.dtype)
    return is_centre_FR, mx.where(is_centre_FR, own_R, home_FR)


def mean_of_roots(
    is_kept_BN: mx.array, tree_BN: mx.array, home_BN: mx.array, size_BN: mx.array,
    is_root_BN: mx.array, K: int,
) -> Reduction:  # fmt: skip
    """Chosen tokens as they are; of each cluster the mean of its roots, each the mean of a tree."""
    index_BK = keep_marked(is_kept_BN, K)
    centre_BN = mx.where(is_root_BN, home_BN, mx.arange(is_root_BN.shape[1]))  # chosen: their own
    centre_BN = take(centre_BN, tree_BN)
    slot_BN = mx.where(centre_BN < 0, -1, take(mx.cumsum(is_kept_BN, axis=1) - 1, centre_BN))
    is_head_BN = tree_BN == mx.arange(tree_BN.shape[1])  # roots and chosen ones
    count_BK = segment_sum((is_head_BN & (slot_BN >= 0))[..., None] * 1.0, slot_BN, K)[..., 0]
    part_BN = 1 / (take(size_BN, tree_BN) * take(count_BK, slot_BN))
    share_BN = mx.where(slot_BN < 0, 0, part_BN).astype(mx.float32)
    return Reduction(index_BK, slot_BN=slot_BN.astype(mx.int32), share_BN=share_BN)
