"""Share the budget among regions, so that no part of the image is lost.

HoloV, Zou et al., NeurIPS 2025, arXiv:2510.02912. The image is cut into regions. A token's
score is its CLS attention plus `beta` times how much its similarity to the other tokens
of its region varies. A region's share of the budget is that of its mean score; inside
it the highest scores stay.

Differs from the authors' code: regions are windows of the grid (theirs are runs of the
raster), attention and variance are both scaled to 0 to 1 within the image (theirs are
multiplied by constants fitted to 576 tokens), and no slot is padded with zeros.

Options:
    regions: windows that share the budget, 1 or more
    beta: weight of the varied similarity beside the attention
    layer: number of the tower's layer that is read; -1 is the last

Shapes: B images, N tokens, K kept, r regions of n tokens each, R of
all images.
"""

import mlx.core as mx
import numpy as np

from .contract import Reduction, Signals, Stage, take
from .grid import of_one_size, windows
from .numerics import choosing, cosine, keep_highest, rounded, scale_to_unit, to_choice_dtype

stage = Stage.FEATURES
needs = {"cls_attention": "layer", "grid": None}


def prune(
    signals: Signals, K: int, *, regions: int = 8, beta: float = 0.09, layer: float = -1
) -> Reduction:
    """Keep K; `layer` is read by the host."""
    N = signals.cls_attention_BN.shape[1]
    if not regions >= 1:
        raise ValueError(f"regions is {regions}; it must be at least 1")
    areas = [window.ravel() for window in windows(signals.grid, min(regions, N))]
    with choosing():
        attention_BN = scale_to_unit(signals.cls_attention_BN)
        varied_BN = scale_to_unit(variation(signals.x_BND, areas))
        return Reduction(best_of_regions(rounded(attention_BN + beta * varied_BN), areas, K))


def variation(x_BND: mx.array, areas: list[np.ndarray]) -> mx.array:
    """The variance of each token's similarity to the tokens of its region, (B, N)."""
    parts, tokens = [], []
    for _, area_rn in of_one_size(areas):
        region_RnD = mx.take(x_BND, mx.array(area_rn), axis=1).flatten(0, 1)
        similar_Rnn = cosine(region_RnD)
        apart_Rnn = similar_Rnn - similar_Rnn[..., :1]  # of near-duplicates, exact in float32 too
        varied_Rn = mx.square(apart_Rnn - apart_Rnn.mean(axis=-1, keepdims=True)).mean(axis=-1)
        parts.append(varied_Rn.reshape(len(x_BND), -1))
        tokens.append(area_rn.ravel())
    place_N = np.argsort(np.concatenate(tokens))  # of each token among the regions' tokens
    return mx.take(mx.concatenate(parts, axis=1), mx.array(place_N), axis=1)


def best_of_regions(score_BN: mx.array, areas: list[np.ndarray], K: int) -> mx.array:
    """The highest scores of every region, as many as its quota, (B, K) ascending.

    Each of the K seats goes to the region whose mean score by the number of seats it would have is
    highest (d'Hondt). So a region's token with rank r claims a seat with that mean by r + 1, and
    the K highest claims win. (A negative mean is not divided: it would grow.)
    """
    claims, tokens, regions = [], [], []
    for numbers, area_rn in of_one_size(areas):
        n, area_1rn = area_rn.shape[1], mx.array(area_rn)[None]
        score_Brn = mx.take(score_BN, area_1rn[0], axis=1)
        order_Brn = mx.argsort(-score_Brn, axis=-1)
        tokens.append(mx.take_along_axis(area_1rn, order_Brn, axis=-1).flatten(1))
        mean_Br1 = score_Brn.mean(axis=-1, keepdims=True)
        seats_Brn = mx.where(mean_Br1 > 0, mx.arange(1, n + 1), 1)
        claims.append((mean_Br1 / to_choice_dtype(seats_Brn)).flatten(1))
        regions.append(np.repeat(numbers, n))
    order_N = mx.array(np.argsort(np.concatenate(regions), kind="stable"))  # region by region
    claim_BN, token_BN = (
        mx.take(mx.concatenate(p, axis=1), order_N, axis=1) for p in (claims, tokens)
    )
    winner_BK = keep_highest(rounded(claim_BN, 9), K)
    return mx.sort(take(token_BN, winner_BK), axis=1)
