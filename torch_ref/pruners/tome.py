"""ToMe (arXiv:2210.09461): in each layer the tokens with the most similar keys merge.

Each token at an odd place finds the most similar of those at even places. A merged
token is the mean of its members, each as heavy as it already is.

Shapes: n tokens, K left, d head size.
"""

import torch
from torch import Tensor

from .contract import Reduction, Signals, weighted_reduction
from .numerics import cosine, highest

needs: dict[str, str | None] = {"keys": None}
proportional = True


def cuts(layers: int, N: int, K: int, r: int = 0) -> list[tuple[int, str, int]]:
    """(layer, place, how many stay)."""
    plan, n = [], N
    for layer in range(layers):
        n = max(K, n - r) if r else N - (N - K) * (layer + 1) // layers
        plan.append((layer, "middle", K if layer == layers - 1 else n))
    return plan


def prune(signals: Signals, K: int) -> Reduction:
    B, N = signals.keys_BNHd.shape[:2]
    sizes_BN = signals.get("size_BN")
    sizes_BN = torch.ones(B, N) if sizes_BN is None else sizes_BN
    pairs = []
    for keys_NHd, size_N in zip(signals.keys_BNHd, sizes_BN, strict=True):
        groups = [[i] for i in range(N)]  # each with its anchor first
        keys_nd, size_n = keys_NHd.float().mean(1), size_N.double()
        while len(groups) > K:
            groups, keys_nd, size_n = merge(groups, keys_nd, size_n, K)
        row_KN = torch.zeros(K, N, dtype=torch.float64)
        for k, members in enumerate(groups):
            row_KN[k, members] = size_N[members].double() / size_N[members].sum()
        pairs.append(([members[0] for members in groups], row_KN))
    return weighted_reduction(signals, pairs)


def merge(
    groups: list[list[int]], keys_nd: Tensor, size_n: Tensor, K: int
) -> tuple[list[list[int]], Tensor, Tensor]:
    """One round of merges."""
    n = len(groups)
    similar_ab = cosine(keys_nd[1::2], keys_nd[::2])
    closest = similar_ab.max(dim=1)
    into = {i: [i] for i in range(n)}
    for a in highest(closest.values, min(n - K, len(similar_ab))):
        into[2 * int(similar_ab[a].argmax())].append(2 * a + 1)
        del into[2 * a + 1]
    keys, sizes, merged = [], [], []
    for _, members in sorted(into.items()):
        weight = size_n[members]
        keys.append((weight.float() / weight.float().sum()) @ keys_nd[members])
        sizes.append(weight.sum())
        merged.append([token for member in members for token in groups[member]])
    return merged, torch.stack(keys), torch.stack(sizes)
