"""VScan's encoder half (arXiv:2505.22654): the best of every window, then the best of the rest."""

import torch

from .contract import Reduction, Signals, alike, best, stacked
from .grid import members, windows

needs = {"local_attention": "local_layer", "cls_attention": "layer"}


def prune(
    signals: Signals, K: int, *, areas: int = 16, local: float = 0.5,
    local_layer: float = 6 / 24, layer: float = -1,
) -> Reduction:  # fmt: skip
    N, first = signals.x_BND.shape[1], int(K * local)
    cut = [members(w, signals.grid[1]) for w in windows(signals.grid, min(areas, N))]
    index, weight = [], []
    for x_ND, early_N, late_N in zip(
        signals.x_BND, signals.local_attention_BN, signals.cls_attention_BN, strict=True
    ):
        kept: list[int] = []
        for i, area in enumerate(cut):
            share = (i + 1) * first // len(cut) - i * first // len(cut)
            kept += [area[j] for j in best(early_N[area], share)]
        rest = [i for i in best(late_N, N) if i not in kept]
        kept = sorted(kept + rest[: K - len(kept)])
        weight_KN, likeness = torch.zeros(K, N), alike(x_ND)
        for i in range(N):
            home = kept.index(i) if i in kept else int(likeness[i, kept].argmax())
            weight_KN[home, i] = 1
        index.append(kept)
        weight.append(weight_KN / weight_KN.sum(dim=1, keepdim=True))
    return stacked(index, weight, signals.x_BND.device)
