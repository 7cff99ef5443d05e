"""DART (arXiv:2502.11494): pivots with large keys, and the tokens least similar to each of them."""

import torch

from .budget import one_cut
from .contract import Reduction, Signals, index_reduction
from .numerics import cosine, highest

needs: dict[str, str | None] = {"held_keys": None, "normed": None}


def schedule(layers: int, N: int, K: int, layer: float = 2 / 32) -> dict[int, int]:
    return one_cut(layers, N, K, layer)


def prune(signals: Signals, K: int, *, pivots: int = 4) -> Reduction:
    index = []
    for b, real_T in enumerate(signals.text_real_BT):
        words_TD, tokens_ND = signals.text_BTD[b][real_T], signals.normed_BND[b]
        norm_N = signals.keys_BND[b].double().abs().sum(-1).round(decimals=12)
        norm_T = signals.text_keys_BTD[b][real_T].double().abs().sum(-1).round(decimals=12)
        kept, words = highest(norm_N, min(pivots, K)), highest(norm_T, pivots)
        similar_PN = [*cosine(tokens_ND)[kept], *cosine(words_TD, tokens_ND)[words]]
        P, rest = len(similar_PN), K - len(kept)
        for p, similar_N in enumerate(similar_PN):
            similar_N = similar_N.clone()
            similar_N[kept] = torch.inf
            share = (p + 1) * rest // P - p * rest // P
            kept = kept + highest(-similar_N, share)
        index.append(sorted(kept))
    return index_reduction(signals, index)
