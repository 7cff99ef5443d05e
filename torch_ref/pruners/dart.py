"""DART (arXiv:2502.11494): pivots with large keys, and what is least like each of them."""

import torch

from .budget import one_cut
from .contract import Reduction, Signals, index_reduction
from .numerics import cosine, highest

needs: dict[str, str | None] = {"held_keys": None, "normed": None}


def schedule(layers: int, N: int, K: int, layer: float = 2 / 32) -> dict[int, int]:
    return one_cut(layers, N, K, layer)


def prune(signals: Signals, K: int, *, pivots: int = 4) -> Reduction:
    s = signals
    index = []
    for b, real_T in enumerate(s.text_real_BT):
        words_TD, tokens_ND = s.text_BTD[b][real_T], s.normed_BND[b]
        size_N = s.keys_BND[b].double().abs().sum(-1).round(decimals=12)
        size_T = s.text_keys_BTD[b][real_T].double().abs().sum(-1).round(decimals=12)
        kept = highest(size_N, min(pivots, K))
        by = [*cosine(tokens_ND)[kept], *cosine(words_TD, tokens_ND)[highest(size_T, pivots)]]
        rest = K - len(kept)
        for p, likeness in enumerate(by):
            likeness = likeness.clone()
            likeness[kept] = torch.inf
            share = (p + 1) * rest // len(by) - p * rest // len(by)
            kept = kept + highest(-likeness, share)
        index.append(sorted(kept))
    return index_reduction(s, index)
