"""HoloV (arXiv:2510.02912): every region of the image gets its share of the budget."""

import torch

from .contract import Reduction, Signals, index_reduction
from .grid import members, windows
from .numerics import cosine, highest, scale_to_unit

needs = {"cls_attention": "layer"}


def prune(
    signals: Signals, K: int, *, regions: int = 8, beta: float = 0.09, layer: float = -1
) -> Reduction:
    N, columns = signals.x_BND.shape[1], signals.grid[1]
    areas = [members(window, columns) for window in windows(signals.grid, min(regions, N))]
    index = []
    for x_ND, attention_N in zip(signals.x_BND, signals.cls_attention_BN, strict=True):
        similar_NN, variance_N = cosine(x_ND), torch.zeros(N, dtype=torch.float64)
        for area in areas:
            variance_N[area] = similar_NN[area][:, area].var(dim=-1, correction=0)
        score_N = scale_to_unit(attention_N) + beta * scale_to_unit(variance_N)
        score_N = score_N.round(decimals=12)
        worth = [score_N[area].mean().item() for area in areas]
        seats = [0] * len(areas)
        for _ in range(K):
            with_room = [a for a in range(len(areas)) if seats[a] < len(areas[a])]
            seats[min(with_room, key=lambda a: (-round(worth[a] / (seats[a] + 1), 9), a))] += 1
        quotas = zip(areas, seats, strict=True)
        index.append(sorted(area[i] for area, n in quotas for i in highest(score_N[area], n)))
    return index_reduction(signals, index)
