"""VScan's encoder half (arXiv:2505.22654): the highest of every window, then of the rest."""

from .contract import Reduction, Signals, weighted_reduction
from .grid import members, windows
from .numerics import highest, nearest_mean

needs = {"local_attention": "local_layer", "cls_attention": "layer"}


def prune(
    signals: Signals, K: int, *, areas: int = 16, local: float = 0.5,
    local_layer: float = 0.21, layer: float = -1,
) -> Reduction:  # fmt: skip
    N, local_K = signals.x_BND.shape[1], int(K * local)
    area_tokens = [members(w, signals.grid[1]) for w in windows(signals.grid, min(areas, N))]
    pairs = []
    for x_ND, early_N, late_N in zip(
        signals.x_BND, signals.local_attention_BN, signals.cls_attention_BN, strict=True
    ):
        kept: list[int] = []
        for i, area in enumerate(area_tokens):
            share = (i + 1) * local_K // len(area_tokens) - i * local_K // len(area_tokens)
            kept += [area[j] for j in highest(early_N[area], share)]
        rest = [i for i in highest(late_N, N) if i not in kept]
        kept = sorted(kept + rest[: K - len(kept)])
        pairs.append((kept, nearest_mean(x_ND, kept)))
    return weighted_reduction(signals, pairs)
