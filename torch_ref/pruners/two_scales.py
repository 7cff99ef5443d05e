"""Hi-Lo Prune's first stage (CVPR 2026): max-min diversity of tokens, then of raw pixels."""

from .contract import Reduction, Signals, index_reduction
from .divprune import in_max_min_order
from .numerics import cosine

needs: dict[str, str | None] = {"pixels": None}


def prune(signals: Signals, K: int, *, fine: float = 0.67) -> Reduction:
    kept = []
    for x_ND, pixels_ND in zip(signals.x_BND, signals.pixels_BND, strict=True):
        by_tokens = in_max_min_order(1 - cosine(x_ND), max(1, int(K * fine + 0.5)))
        by_pixels = in_max_min_order(1 - cosine(pixels_ND), K)
        more = [i for i in by_pixels if i not in by_tokens]
        kept.append(sorted([*by_tokens, *more][:K]))
    return index_reduction(signals, kept)
