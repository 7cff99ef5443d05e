"""VisPruner (arXiv:2412.01818): half by CLS attention, half by thinning out what is alike."""

from torch import Tensor

from .contract import Reduction, Signals, index_reduction
from .numerics import cosine, highest

needs = {"cls_attention": "layer"}


def prune(signals: Signals, K: int, *, important: float = 0.5, layer: float = -1) -> Reduction:
    pairs = zip(signals.x_BND, signals.cls_attention_BN, strict=True)
    index = [select_tokens(cosine(x), row, K, int(K * important)) for x, row in pairs]
    return index_reduction(signals, index)


def select_tokens(likeness: Tensor, attention_N: Tensor, K: int, first: int) -> list[int]:
    order = highest(attention_N, len(attention_N))
    important, rest = order[:first], order[first:]
    while len(rest) > K - first:
        if first == K:
            rest = []
            break
        drop = min(8, len(rest) - (K - first), (len(rest) + 1) // 2)
        scored = [
            (-likeness[a, rest[1::2]].max().item(), place) for place, a in enumerate(rest[::2])
        ]
        gone = {2 * place for _, place in sorted(scored)[:drop]}
        rest = [token for place, token in enumerate(rest) if place not in gone]
    return sorted(important + rest)
