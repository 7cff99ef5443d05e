"""SparseVLM (arXiv:2410.04417): by the attention of words about the image; some are recycled.

Shapes: N tokens, K kept, T words, D features.
"""

import torch
from torch import Tensor

from .budget import several_cuts
from .clusters import density_peaks, distances
from .contract import Reduction, Signals, weighted_reduction
from .numerics import highest

needs: dict[str, str | None] = {"text_attention": None, "text_share": None}


def schedule(layers: int, N: int, K: int) -> dict[int, int]:
    def counts(t: float) -> list[int]:
        shares = (1, 200 / 300, 110 / 300)
        return [min(N, max(1, int(N * t * share / shares[2]))) for share in shares]

    return several_cuts(layers, N, K, (3 / 32, 7 / 32, 16 / 32), counts)


def prune(signals: Signals, K: int, *, recycle: float = 0.3, sums: bool = False) -> Reduction:
    pairs = []
    for b, real_T in enumerate(signals.text_real_BT):
        share_T = signals.text_share_BT[b][real_T].double().round(decimals=12)
        is_rater_T = share_T > (share_T.sum() / len(share_T)).round(decimals=12)
        if not is_rater_T.any():
            is_rater_T = ~is_rater_T
        attention_TN = signals.text_attention_BTN[b][real_T][is_rater_T].double()
        score_N = attention_TN.mean(dim=0).round(decimals=12)
        kept, weight_KN = recycle_best_dropped(score_N, signals.x_BND[b], K, recycle)
        pairs.append((kept, weight_KN if sums else weight_KN / weight_KN.sum(dim=1, keepdim=True)))
    return weighted_reduction(signals, pairs)


def recycle_best_dropped(
    score_N: Tensor, x_ND: Tensor, K: int, recycle: float
) -> tuple[list[int], Tensor]:
    N, order = len(score_N), highest(score_N, len(score_N))
    unchanged, recycled, C = split_budget(N, K, recycle)
    weight_NN = torch.eye(N)
    kept, pool = order[:unchanged], sorted(order[unchanged : unchanged + recycled])
    if C:
        distance_nn = distances(x_ND[pool])
        centres = density_peaks(distance_nn, C)
        for i in range(len(pool)):
            home = i if i in centres else min(centres, key=lambda c: (distance_nn[i, c].item(), c))
            weight_NN[pool[home], pool[i]] = 1
        kept = kept + [pool[c] for c in centres]
    kept = sorted(kept)
    return kept, weight_NN[kept]


def split_budget(N: int, K: int, recycle: float) -> tuple[int, int, int]:
    """The most tokens that may stay unchanged, with the recycled and clusters that make K."""
    splits = []
    for unchanged in range(1, K + 1):
        recycled = int(recycle * (N - unchanged)) + 1 if recycle else 0
        clusters = recycled // 10 + 1 if recycled else 0
        splits.append((unchanged, min(recycled, N - unchanged), min(clusters, K - unchanged)))
        if unchanged + clusters > K:
            return splits[-2] if len(splits) > 1 else splits[0]
    return splits[-1]
