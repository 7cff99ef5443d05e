"""DART (arXiv:2502.11494): pivots with large keys, and what is least like each of them."""

import torch

from .budget import single
from .contract import Reduction, Signals, alike, best, selected

needs: dict[str, str | None] = {"held_keys": None, "normed": None}


def schedule(layers: int, N: int, K: int, layer: float = 2 / 32) -> dict[int, int]:
    return single(layers, N, K, layer)


def prune(signals: Signals, K: int, *, pivots: int = 4) -> Reduction:
    s = signals
    index = []
    for b, real_T in enumerate(s.text_real_BT):
        words_TD, tokens_ND = s.text_BTD[b][real_T], s.normed_BND[b]
        size_N = s.keys_BND[b].double().abs().sum(-1).round(decimals=12)
        size_T = s.text_keys_BTD[b][real_T].double().abs().sum(-1).round(decimals=12)
        kept = best(size_N, min(pivots, K))
        by = [*alike(tokens_ND)[kept], *alike(words_TD, tokens_ND)[best(size_T, pivots)]]
        rest = K - len(kept)
        for p, likeness in enumerate(by):
            likeness = likeness.clone()
            likeness[kept] = torch.inf
            share = (p + 1) * rest // len(by) - p * rest // len(by)
            kept = kept + best(-likeness, share)
        index.append(sorted(kept))
    return selected(s, index)
