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

Shapes: B images, N tokens, K kept, n tokens of a region.
"""

import mlx.core as mx
import numpy as np

from .contract import Reduction, Signals, Stage
from .grid import windows
from .numerics import choice_dtype, choosing, cosine, rounded, scale_to_unit

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
        similar_BNN = np.array(cosine(signals.x_BND))
        varied_BN = np.zeros(similar_BNN.shape[:2])
        for area in areas:
            varied_BN[:, area] = similar_BNN[:, area][:, :, area].var(axis=-1)
        attention_BN = scale_to_unit(signals.cls_attention_BN)
        score_BN = np.array(
            rounded(attention_BN + beta * scale_to_unit(mx.array(varied_BN, choice_dtype())))
        )
    index_BK = np.stack([best_of_regions(score_N, areas, K) for score_N in score_BN])
    return Reduction(index_BK=mx.array(index_BK))


def best_of_regions(score_N: np.ndarray, areas: list[np.ndarray], K: int) -> np.ndarray:
    """The highest scores of every region, as many as its quota, (K,) ascending."""
    quotas = allocate([score_N[area].mean() for area in areas], [len(area) for area in areas], K)
    best = [area[np.argsort(-score_N[area], kind="stable")] for area in areas]
    return np.sort(np.concatenate([area[:n] for area, n in zip(best, quotas, strict=True)]))


def allocate(worth: list[float], room: list[int], K: int) -> list[int]:
    """K seats in proportion to worth, one after another: each to the region whose worth by the
    number of seats it would have is highest, of those with room."""
    seats = [0] * len(worth)
    for _ in range(K):
        regions = zip(worth, seats, room, strict=True)
        claims = [w / (n + 1) if n < r else -1.0 for w, n, r in regions]
        seats[max(range(len(claims)), key=lambda i: (round(claims[i], 9), -i))] += 1
    return seats
