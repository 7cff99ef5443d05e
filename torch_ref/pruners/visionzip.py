"""VisionZip (arXiv:2412.04467): dominant tokens by CLS attention, the rest merged into a few.

Shapes: N tokens, K kept, H heads, d head size.
"""

import torch
from torch import Tensor

from .contract import Reduction, Signals, weighted_reduction
from .numerics import cosine, highest

needs = {"cls_attention": "layer", "keys": "layer"}


def prune(signals: Signals, K: int, *, contextual: float = 10 / 64, layer: float = -1) -> Reduction:
    C = min(int(K * contextual + 0.5), K - 1)
    images = zip(signals.cls_attention_BN, signals.keys_BNHd, strict=True)
    pairs = [merge_rest(row_N, keys_NHd.float().mean(1), K, C) for row_N, keys_NHd in images]
    return weighted_reduction(signals, pairs)


def merge_rest(attention_N: Tensor, keys_Nd: Tensor, K: int, C: int) -> tuple[list[int], Tensor]:
    """Index and weights (K, N): dominant tokens, and C targets plus the mean of what joined."""
    N = len(attention_N)
    dominant = highest(attention_N, K - C)
    rest = [i for i in range(N) if i not in set(dominant)]
    targets = rest[:: len(rest) // C][:C] if C else []
    joined: dict[int, list[int]] = {t: [] for t in targets}
    similar_NN = cosine(keys_Nd)
    for i in rest if C else []:
        if i not in joined:
            joined[max(targets, key=lambda t: (similar_NN[i, t].item(), -t))].append(i)
    index = sorted([*dominant, *targets])
    weight_KN = torch.zeros(K, N)
    for k, i in enumerate(index):
        weight_KN[k, i] = 1
        for j in joined.get(i, []):
            weight_KN[k, j] = 1 / len(joined[i])
    return index, weight_KN
