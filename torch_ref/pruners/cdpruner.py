"""CDPruner (arXiv:2506.10967): greedy determinantal point process, conditioned on the text.

Shapes: N tokens, K kept, T words.
"""

import torch
from torch import Tensor

from .contract import Reduction, Signals, index_reduction
from .numerics import cosine, scale_to_unit

needs: dict[str, str | None] = {"text": None}


def prune(signals: Signals, K: int, *, negative: bool = False) -> Reduction:
    index = []
    for x_ND, text_TD, real_T in zip(
        signals.x_BND, signals.text_BTD, signals.text_real_BT, strict=True
    ):
        mean_N = cosine(x_ND, text_TD[real_T]).mean(dim=1)
        mean_N = (-mean_N if negative else mean_N).round(decimals=12)
        relevance = scale_to_unit(mean_N) + 1e-6
        index.append(greedy(relevance, relevance[:, None] * cosine(x_ND) * relevance, K))
    return index_reduction(signals, index)


def greedy(relevance: Tensor, kernel_NN: Tensor, K: int) -> list[int]:
    """The set that grows by the token of largest variance given the set; once that is 0, of largest
    relevance."""
    variance = kernel_NN.diagonal().clone()
    factor: list[Tensor] = []
    kept: list[int] = []
    for _ in range(K):
        score = torch.where(variance > 1e-9, variance, relevance - 2)
        score[kept] = -torch.inf
        j = int(score.argmax())
        kept.append(j)
        if variance[j] > 1e-9:
            row = kernel_NN[j].clone()
            for earlier in factor:
                row -= earlier[j] * earlier
            factor.append(row / variance[j].sqrt())
            variance = variance - factor[-1].square()
    return sorted(kept)
