"""Keep the tokens that CLS attends to most, and merge the rest into a few.

VisionZip, Yang et al., CVPR 2025, arXiv:2412.04467. Dominant tokens: the highest CLS
attention. Of the rest, in raster order, evenly spaced ones are targets; each other one
joins the target with the most similar key (mean over heads). A contextual token is its
target plus the mean of those that joined. The share of contextual tokens is 10 of 64.

As the authors' code (github.com/dvlab-research/VisionZip@3151f6d), also where the paper averages
(target plus mean, not the mean of all). Differs: slots stay in raster order, since each keeps its
position of the image, where theirs count on with the contextual ones at the end; CLS itself is not
handed on, since it is no part of the image and K counts these (theirs counts it as a dominant one).

Options:
    contextual: share of K that is merged from the rest, 0 to below 1
    layer: number of the tower's layer that is read; -1 is the last

Shapes: B images, N tokens, K kept: A dominant and C contextual; R not dominant, H heads, d head
size.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage, segment_sum, take
from .numerics import choosing, keep_highest, keep_marked, mask_of, unit
from .rows import nearest

stage = Stage.FEATURES
needs = {"cls_attention": "layer", "keys": "layer"}


def prune(signals: Signals, K: int, *, contextual: float = 10 / 64, layer: float = -1) -> Reduction:
    """Keep K - C and merge the rest into C = K * `contextual`; `layer` is read by the host."""
    if not 0 <= contextual < 1:
        raise ValueError(f"contextual is {contextual}; it is a share of K from 0 to below 1")
    C = min(int(K * contextual + 0.5), K - 1)
    dominant_BA = keep_highest(signals.cls_attention_BN, K - C)
    if not C:
        return Reduction(dominant_BA, score_BN=signals.cls_attention_BN)
    with choosing():
        keys_BNd = signals.keys_BNHd.astype(mx.float32).mean(axis=2)
        N = keys_BNd.shape[1]
        is_dominant_BN = mask_of(dominant_BA, N)
        rest_BR = mx.argsort(is_dominant_BN, axis=-1)[:, : N - K + C]
        target_BC = rest_BR[:, :: (N - K + C) // C][:, :C]
        is_kept_BN = is_dominant_BN | mask_of(target_BC, N)
        keys_BNd = unit(keys_BNd)
        _, nearest_BN = nearest(keys_BNd, take(keys_BNd, target_BC))
        home_BN = mx.where(is_kept_BN, mx.arange(N), take(target_BC, nearest_BN))
        slot_BN = take(mx.cumsum(is_kept_BN, axis=1) - 1, home_BN)
        joins_BN = (~is_kept_BN).astype(mx.float32)
        joined_BK = segment_sum(joins_BN[..., None], slot_BN, K)[..., 0]
        share_BN = mx.where(is_kept_BN, 1, 1 / take(joined_BK, slot_BN))
        return Reduction(
            keep_marked(is_kept_BN, K), slot_BN=slot_BN, share_BN=share_BN,
            score_BN=signals.cls_attention_BN,
        )  # fmt: skip
