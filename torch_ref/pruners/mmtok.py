"""MMTok (arXiv:2508.18264): greedily the tokens that cover the words and the image."""

import torch

from .contract import Reduction, Signals, index_reduction
from .numerics import cosine
from .scope import greedy_cover

needs: dict[str, str | None] = {"text": None, "features": None}


def prune(
    signals: Signals, K: int, *, image: float = 0.5, sharp: float = 0.02, soft: float = 0.2
) -> Reduction:
    index, N = [], signals.x_BND.shape[1]
    for x_ND, feature_ND, text_TD, real_T in zip(
        signals.x_BND, signals.features_BND, signals.text_BTD, signals.text_real_BT, strict=True
    ):
        words_TN = (cosine(text_TD[real_T], x_ND) / sharp).softmax(dim=-1) * N**2 / real_T.sum()
        tokens_NN = (cosine(feature_ND) / soft).softmax(dim=-1) * image * N
        rows_MN = torch.cat([words_TN, tokens_NN]).round(decimals=12)
        index.append(greedy_cover(rows_MN, torch.ones(N, dtype=torch.float64), K))
    return index_reduction(signals, index)
