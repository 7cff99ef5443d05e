"""SparseVLM (arXiv:2410.04417): by the attention of words about the image; some are recycled.

Shapes: N tokens, K kept, T words, D features.
"""

import torch
from torch import Tensor

from .budget import several_cuts
from .clusters import density_peaks, distances
from .contract import Reduction, Signals, weighted_reduction
from .numerics import highest

needs: dict[str, str | None] = {"text_attention": None, "normed": None}


def schedule(layers: int, N: int, K: int) -> dict[int, int]:
    def counts(t: float) -> list[int]:
        shares = (1, 200 / 300, 110 / 300)
        return [min(N, max(1, int(N * t * share / shares[2]))) for share in shares]

    return several_cuts(layers, N, K, (2 / 32, 6 / 32, 15 / 32), counts)


def prune(signals: Signals, K: int, *, recycle: float = 0.3) -> Reduction:
    pairs = []
    for b, real_T in enumerate(signals.text_real_BT):
        logits_NT = signals.normed_BND[b].double() @ signals.text_BTD[b][real_T].double().T
        share_T = logits_NT.softmax(dim=-1).mean(dim=0).round(decimals=12)
        is_rater_T = share_T >= (share_T.sum() / len(share_T)).round(decimals=12)
        attention_TN = signals.text_attention_BTN[b][real_T][is_rater_T].double()
        score_N = attention_TN.mean(dim=0).round(decimals=12)
        pairs.append(recycle_best_dropped(score_N, signals.x_BND[b], K, recycle))
    return weighted_reduction(signals, pairs)


def recycle_best_dropped(
    score_N: Tensor, x_ND: Tensor, K: int, recycle: float
) -> tuple[list[int], Tensor]:
    N, order = len(score_N), highest(score_N, len(score_N))
    recycled_count = int(recycle * (N - K))
    C = min(recycled_count // 10 + 1, K - 1) if recycled_count else 0
    weight_NN = torch.eye(N)
    kept, pool = order[: K - C], sorted(order[K - C : K - C + max(recycled_count, C)])
    if C:
        distance_nn = distances(x_ND[pool])
        centres = density_peaks(distance_nn, C)
        for i in range(len(pool)):
            home = i if i in centres else min(centres, key=lambda c: (distance_nn[i, c].item(), c))
            weight_NN[pool[home], pool[i]] = 1
        kept = kept + [pool[c] for c in centres]
    kept = sorted(kept)
    return kept, weight_NN[kept]
