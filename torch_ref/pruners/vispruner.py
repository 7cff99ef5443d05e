"""VisPruner (arXiv:2412.01818): half by CLS attention, half by thinning out similar tokens."""

from torch import Tensor

from .contract import Reduction, Signals, index_reduction
from .numerics import cosine, highest

needs = {"cls_attention": "layer"}


def prune(signals: Signals, K: int, *, important: float = 0.5, layer: float = -1) -> Reduction:
    pairs = zip(signals.x_BND, signals.cls_attention_BN, strict=True)
    index = [select_tokens(cosine(x), row, K, int(K * important)) for x, row in pairs]
    return index_reduction(signals, index)


def select_tokens(similar_NN: Tensor, attention_N: Tensor, K: int, count: int) -> list[int]:
    """`count` tokens by attention, and K - count unlike the others."""
    order = highest(attention_N, len(attention_N))
    important, rest = order[:count], order[count:]
    while len(rest) > K - count:
        if count == K:
            rest = []
            break
        leaving = min(8, len(rest) - (K - count), (len(rest) + 1) // 2)
        most_similar = sorted(
            (-similar_NN[a, rest[1::2]].max().item(), 2 * i) for i, a in enumerate(rest[::2])
        )
        rest = [rest[i] for _, i in most_similar[leaving:]] + rest[1::2]
    return sorted(important + rest)
