"""Keep one half by an early layer's attention, window by window, the other half by the last's.

The encoder half of VScan, Zhang et al., TMLR 2026, arXiv:2505.22654. Local: at an early layer
(5 of 24, from 0) CLS attention, the highest of each window of the image, as many from each.
Global: CLS attention at the end, the highest of the rest. Each dropped token merges into the
kept one most similar to it (the mean), after the projector. The whole of VScan, which drops
again inside the decoder, is the preset `vscan`.

As the authors' code (github.com/Tencent/SelfEvolvingAgent@a82450e), whose early layer in
Qwen2.5-VL is the same share, 7 of 32. Differs: any number of windows of any grid; where the local
half is no multiple of their number, some keep one more (theirs keeps fewer than K in all).

Options:
    areas: windows of the local half, 1 or more
    local: share of K that is chosen within windows, 0 to 1
    local_layer: layer of the tower for the local half; below 1 a share of the depth
    layer: number of the tower's layer for the global half; -1 is the last

Shapes: B images, N tokens, K kept, n tokens of a window, k kept of them, r
windows alike, R of all images.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np

from .contract import Reduction, Signals, Stage
from .grid import of_one_size, windows
from .numerics import choosing, keep_highest, mask_of
from .rows import nearest_slots

stage = Stage.PROJECTED
needs = {"local_attention": "local_layer", "cls_attention": "layer", "grid": None}


def prune(
    signals: Signals, K: int, *, areas: int = 16, local: float = 0.5,
    local_layer: float = 0.21, layer: float = -1,
) -> Reduction:  # fmt: skip
    """Keep K; the layers are read by the host."""
    if areas < 1 or not 0 <= local <= 1:
        raise ValueError("areas is at least 1, and local a share of K from 0 to 1")
    N, local_K = signals.x_BND.shape[1], int(K * local)
    area_windows, chosen = windows(signals.grid, min(areas, N)), []
    ends = np.arange(len(area_windows) + 1) * local_K // len(area_windows)
    for numbers, area_rn in of_one_size(area_windows):
        share_r = np.minimum(np.diff(ends)[numbers], area_rn.shape[1])
        for share in set(share_r.tolist()):
            some_rn = area_rn[share_r == share]
            chosen.append(best_of_areas(signals.local_attention_BN, some_rn, share))
    is_local_BN = mask_of(mx.concatenate(chosen, axis=1), N)
    score_BN = mx.where(is_local_BN, mx.inf, signals.cls_attention_BN)
    index_BK = keep_highest(score_BN, K)
    with choosing():
        merged = Reduction.merge(index_BK, nearest_slots(signals.x_BND, index_BK)[1])
        return replace(merged, score_BN=score_BN)


def best_of_areas(score_BN: mx.array, area_rn: np.ndarray, k: int) -> mx.array:
    """The k tokens with the highest scores of each of r areas of n tokens, (B, r * k)."""
    area_1rn = mx.array(area_rn)[None]
    best_Rk = keep_highest(mx.take(score_BN, area_1rn[0], axis=1).flatten(0, 1), k)
    best_Brk = best_Rk.reshape(len(score_BN), len(area_rn), k)
    return mx.take_along_axis(area_1rn, best_Brk, axis=2).flatten(1)
