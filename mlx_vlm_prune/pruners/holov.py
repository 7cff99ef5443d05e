"""Share the budget among regions, so that no part of the image is lost.

HoloV, Zou et al., NeurIPS 2025, arXiv:2510.02912. The image is cut into regions, runs of the
raster. A region's score is its mean CLS attention, plus `beta` times the mean of how much each
token's similarity to the others of its region varies, scaled to that attention. A region's share
of the budget is that of its score, rounded down; what is left goes to the highest scores, a token
each. Inside a region the tokens with the highest attention stay.

A token's similarity to itself counts as 0. As variances are scaled by their mean, a region's score
comes to its mean attention times 1 + `beta`, in nearly every region: so `beta` hardly matters.

As the authors' code (github.com/obananas/HoloV@1d2e65e), also where the paper ranks tokens by
their own scores. Differs: seats beyond a region's tokens go to the highest attention of the whole
image, where theirs are zeros; a region of one token is scored as the others are, where theirs
counts a thousandth; shares are rounded to six digits; regions are of one number, where theirs for
Qwen2.5-VL are 16 N / 9 K, rounded down, at least one.

Options:
    regions: runs of the raster that share the budget, 1 or more; the authors' 16 is for LLaVA
    beta: weight of the varied similarity beside the attention
    layer: number of the tower's layer that is read; -1 is the last

Shapes: B images, N tokens, K kept, A regions, r of them of n tokens each, R of all images.
"""

import mlx.core as mx
import numpy as np

from .contract import Reduction, Signals, Stage
from .grid import of_one_size
from .numerics import (
    choice_dtype,
    choosing,
    constant,
    cosine,
    keep_highest,
    rounded,
    to_choice_dtype,
)

stage = Stage.PROJECTED
needs: dict[str, str | None] = {"cls_attention": "layer"}
SMALL = 1e-6
SCALE = 1e3  # of attention, beside SMALL


def prune(
    signals: Signals, K: int, *, regions: int = 16, beta: float = 0.09, layer: float = -1
) -> Reduction:
    """Keep K; `layer` is read by the host."""
    attention_BN = signals.cls_attention_BN
    if not regions >= 1:
        raise ValueError(f"regions is {regions}; it must be at least 1")
    areas = np.array_split(np.arange(attention_BN.shape[1]), min(regions, attention_BN.shape[1]))
    with choosing():
        score, rank = [], []
        for _, area_rn in of_one_size(areas):  # the larger ones are the first
            part_Brn = mx.take(attention_BN, mx.array(area_rn), axis=1)
            varied_Br = variation(mx.take(signals.x_BND, mx.array(area_rn), axis=1))
            mean_Br = SCALE * to_choice_dtype(part_Brn).mean(axis=-1)
            score.append(mean_Br * (1 + constant(beta) * varied_Br / (varied_Br + SMALL)))
            rank.append(mx.argsort(mx.argsort(-part_Brn, axis=-1), axis=-1).flatten(1))
        seats_BA = seats(mx.concatenate(score, axis=1), K)
        region_N = np.repeat(np.arange(len(areas)), [len(area) for area in areas])
        stays_BN = mx.concatenate(rank, axis=1) < mx.take(seats_BA, mx.array(region_N), axis=1)
        score_BN = mx.where(stays_BN, mx.inf, attention_BN)
        return Reduction(keep_highest(score_BN, K), score_BN=score_BN)


def variation(x_BrnD: mx.array) -> mx.array:
    """The mean over a region's tokens of the variance of their similarities, (B, r)."""
    n = x_BrnD.shape[2]
    similar_Rnn = cosine(x_BrnD.flatten(0, 1)) * (1 - mx.eye(n, dtype=choice_dtype()))
    mean_Rn1 = similar_Rnn.sum(axis=-1, keepdims=True) / max(n - 1, 1)
    varied_Rn = mx.square(similar_Rnn - mean_Rn1).sum(axis=-1) / max(n - 1, 1)
    return varied_Rn.mean(axis=-1).reshape(x_BrnD.shape[:2])


def seats(score_BA: mx.array, K: int) -> mx.array:
    """How many of K tokens each region gets, (B, A); SMALL alone never decides between them."""
    share_BA = rounded(score_BA / (score_BA.sum(axis=-1, keepdims=True) + SMALL), 6)
    whole_BA = mx.floor(share_BA * K).astype(mx.int32)
    rank_BA = mx.argsort(mx.argsort(-share_BA, axis=-1), axis=-1)
    return whole_BA + (rank_BA < K - whole_BA.sum(axis=-1, keepdims=True))
