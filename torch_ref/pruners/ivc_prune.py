"""IVC-Prune (arXiv:2602.03060): seeds and anchors, and what is like the words and the seeds.

Shapes: N tokens, R rows, H heads, d head size.
"""

import torch
from torch import Tensor

from .budget import one_cut
from .contract import Reduction, Signals, index_reduction
from .ivc import anchor_ranks
from .numerics import highest

needs: dict[str, str | None] = {"held_values": None, "rotation": None}


def schedule(layers: int, N: int, K: int, layer: float = 0.07) -> dict[int, int]:
    return one_cut(layers, N, K, layer)


def prune(signals: Signals, K: int, anchors: float = 0.2, seeds: float = 0.01) -> Reduction:
    index = []
    for b, values_NHd in enumerate(signals.held_values_BNHd.double()):
        N = len(values_NHd)
        words_RHd = signals.text_values_BTHd[b][signals.text_real_BT[b]].double()
        by_words_RN = likeness(words_RHd, values_NHd)
        seed = highest(by_words_RN.sum(dim=0).round(decimals=12), max(1, round(N * seeds)))
        rows_RN = torch.cat([by_words_RN, likeness(values_NHd[sorted(seed)], values_NHd)])
        like_N = rows_RN.mean(dim=0)
        ranks = anchor_ranks(signals.rotary_cosine_BN[b], signals.rotary_sine_BN[b])
        for i, rank in enumerate(ranks):
            like_N[i] += 4 * (i in seed) + 2 * (rank < round(K * anchors))
        index.append(sorted(highest(like_N.round(decimals=12), K)))
    return index_reduction(signals, index)


def likeness(rows_RHd: Tensor, values_NHd: Tensor) -> Tensor:
    """Of each row a softmax over the tokens of the products of their values, mean over heads."""
    logits_HRN = torch.einsum("rhd,nhd->hrn", rows_RHd, values_NHd) / values_NHd.shape[-1] ** 0.5
    return logits_HRN.softmax(dim=-1).mean(dim=0)
