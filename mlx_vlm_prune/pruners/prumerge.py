"""Keep the tokens that CLS attends to most; each adds its most similar neighbours.

LLaVA-PruMerge, Shang et al., ICCV 2025, arXiv:2403.15388. The score is the softmax of CLS's
query with the keys, CLS's own among them, all heads together as one. Every kept token adds its
32 nearest (by the cosine of the keys), each times its score; one more slot is the sum of all
dropped tokens, each times its score.

As the authors' code (github.com/42Shawn/LLaVA-PruMerge@097c041) for its number of tokens, also in
the layer: of LLaVA's 24 the last, which reads the features. Differs: the budget is K (theirs
counts outliers, about 32 in the mean: see `prumerge_plus`); slots are in raster order, and the sum
is at the place of the strongest token dropped, since each keeps a position of the image, where
theirs count on with the sum at the end; of a tower without a layer behind its features the last is
read.

Options:
    neighbours: how many similar tokens each kept one adds, 0 or more
    layer: number of the tower's layer that is read; -1 is the one whose output the features are
    behind: read the layer behind that one

Shapes: B images, N tokens, S = N + 1 with CLS, K slots, C kept tokens, H heads, d head size,
D = H d.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage, take
from .numerics import choosing, fused, keep_highest, mask_of, rounded, softmax, to_choice_dtype
from .rows import block_size, cosine_rows

stage = Stage.FEATURES
needs = {"cls_query": "layer", "cls_key": "layer", "keys": "layer"}


def prune(
    signals: Signals, K: int, *, neighbours: int = 32, layer: float = -1, behind: bool = True
) -> Reduction:
    """Keep K - 1 and a sum of the rest; `layer` and `behind` are read by the host."""
    with choosing():
        score_BN = cls_scores(signals)
        kept_BC = keep_highest(score_BN, max(1, K - 1))
        return with_sum_of_rest(signals, score_BN, kept_BC, K, neighbours)


def with_sum_of_rest(
    signals: Signals, score_BN: mx.array, kept_BC: mx.array, K: int, neighbours: int
) -> Reduction:
    """Kept tokens that add their neighbours, and, of K slots above one, the sum of the rest."""
    weight_BCN = with_neighbours(signals, score_BN, kept_BC, neighbours)
    if K == 1:
        return Reduction(kept_BC, weight_BCN, score_BN=score_BN)
    dropped_BN = mx.where(mask_of(kept_BC, score_BN.shape[1]), -1, score_BN)
    strongest_B1 = mx.argmax(dropped_BN, axis=-1, keepdims=True).astype(kept_BC.dtype)
    rest_B1N = mx.maximum(dropped_BN, 0)[:, None].astype(mx.float32)
    index_BK = mx.concatenate([kept_BC, strongest_B1], axis=1)
    weight_BKN = mx.concatenate([weight_BCN, rest_B1N], axis=1)
    raster_BK = mx.argsort(index_BK, axis=1)
    weight_BKN = take(weight_BKN, raster_BK)
    return Reduction(take(index_BK, raster_BK), weight_BKN, score_BN=score_BN)


def cls_scores(signals: Signals) -> mx.array:
    """Of a softmax of CLS's query with CLS's key and every other, the others' part, (B, N)."""
    query_BD1 = to_choice_dtype(signals.cls_query_BHd).flatten(1)[..., None]
    keys_BSHd = mx.concatenate([signals.cls_key_BHd[:, None], signals.keys_BNHd], axis=1)
    keys_BSD = to_choice_dtype(keys_BSHd).flatten(2)
    return rounded(softmax((keys_BSD @ query_BD1)[..., 0] / keys_BSD.shape[-1] ** 0.5)[:, 1:])


def with_neighbours(
    signals: Signals, score_BN: mx.array, kept_BC: mx.array, neighbours: int
) -> mx.array:
    """Weights (B, C, N) of kept tokens that each add their neighbours."""
    if neighbours < 0:
        raise ValueError(f"neighbours is {neighbours}; it must be 0 or more")
    N = score_BN.shape[1]
    similar, own_BN = cosine_rows(signals.keys_BNHd.astype(mx.float32).flatten(2)), mx.arange(N)
    size, score_B1N, weights = block_size(N), score_BN[:, None].astype(mx.float32), []
    for first in range(0, kept_BC.shape[1], size):
        some_BC = kept_BC[:, first : first + size]
        is_self_BCN = some_BC[..., None] == own_BN
        similar_BCN = mx.where(is_self_BCN, -mx.inf, similar.take(some_BC))
        weights.append(is_self_BCN + highest_mask(similar_BCN, min(neighbours, N - 1)) * score_B1N)
    return mx.concatenate(weights, axis=1)


def highest_mask(score_BCN: mx.array, k: int) -> mx.array:
    """Which of N entries are the k highest, (B, C, N); of equals the first."""
    if not k:
        return mx.zeros(score_BCN.shape, dtype=mx.bool_)
    low_BCN = -score_BCN
    least_BC1 = mx.partition(low_BCN, k - 1, axis=-1)[..., k - 1 : k]
    is_above_BCN, ties_BCN = low_BCN < least_BC1, low_BCN == least_BC1
    room_BC1 = k - is_above_BCN.sum(axis=-1, keepdims=True)
    return with_first_ties(is_above_BCN, ties_BCN, mx.cumsum(ties_BCN, axis=-1), room_BC1)


@fused
def with_first_ties(
    is_above_BCN: mx.array, ties_BCN: mx.array, number_BCN: mx.array, room_BC1: mx.array
) -> mx.array:
    """Those above, and the ties for which there is room; their numbers begin at 1."""
    return is_above_BCN | (ties_BCN & (number_BCN <= room_BC1))
