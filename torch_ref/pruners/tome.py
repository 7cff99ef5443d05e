"""ToMe (arXiv:2210.09461): in each layer the tokens with the most similar keys merge.

Tokens stand in an order: behind CLS where there is one, and what is left of A before B after a
round. Each at an even place (A) finds the most similar of those at odd places (B). A merged
token is the mean of its members, each as heavy as it already is.

Shapes: n tokens, K left, d head size.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .contract import Reduction, Signals, weighted_reduction
from .numerics import cosine, highest

needs: dict[str, str | None] = {"keys": None}
proportional = True


def cuts(
    layers: int, N: int, K: int, r: int = 0, inflect: float = 0.0
) -> list[tuple[int, str, int]]:
    """(layer, place, how many stay)."""
    plan, n = [], N
    # In each layer its share, which falls or rises from layer to layer by equal steps.
    step = inflect / max(layers - 1, 1)
    shares = [1 - inflect + 2 * step * layer for layer in range(layers)]
    for layer in range(layers):
        left = N - int((N - K) * sum(shares[: layer + 1]) / layers + 1e-9)
        n = max(K, n - r) if r else left
        plan.append((layer, "middle", K if layer == layers - 1 else n))
    return plan


def prune(signals: Signals, K: int) -> Reduction:
    B, N = signals.keys_BNHd.shape[:2]
    sizes_BN, places_BN = signals.get("size_BN"), signals.get("place_BN")
    sizes_BN = torch.ones(B, N) if sizes_BN is None else sizes_BN
    places_BN = torch.arange(N).expand(B, N) if places_BN is None else places_BN
    pairs, places = [], []
    for b, keys_NHd in enumerate(signals.keys_BNHd):
        size_N, order = sizes_BN[b].double(), places_BN[b].argsort().tolist()
        groups = [[i] for i in order]  # each with its anchor first, in the order of dealing
        keys_nd, size_n = keys_NHd.float().mean(1)[order], size_N[order]
        while len(groups) > K:
            groups, keys_nd, size_n = merge(groups, keys_nd, size_n, K, signals.has_cls)
        row_KN = torch.zeros(K, N, dtype=torch.float64)
        for k, members in enumerate(sorted(groups)):
            row_KN[k, members] = size_N[members] / size_N[members].sum()
        pairs.append((sorted(members[0] for members in groups), row_KN))
        places.append([groups.index(members) for members in sorted(groups)])
    return replace(weighted_reduction(signals, pairs), place_BK=torch.tensor(places))


def merge(
    groups: list[list[int]], keys_nd: Tensor, size_n: Tensor, K: int, has_cls: bool
) -> tuple[list[list[int]], Tensor, Tensor]:
    """One round of merges."""
    n = len(groups)
    of_a, of_b = list(range(n))[has_cls::2], list(range(n))[1 - has_cls :: 2]
    similar_ab = cosine(keys_nd[of_a], keys_nd[of_b])
    likest = highest(similar_ab.max(dim=1).values, len(of_a))
    leaving = min(n - K, n // 2)
    into = {b: [b] for b in of_b}
    for a in likest[:leaving]:
        into[of_b[int(similar_ab[a].argmax())]].append(of_a[a])
    rest = sorted(likest[leaving:]) if has_cls else likest[leaving:]
    keys, sizes, merged = [], [], []
    for members in [*([of_a[a]] for a in rest), *into.values()]:
        weight = size_n[members]
        keys.append((weight.float() / weight.float().sum()) @ keys_nd[members])
        sizes.append(weight.sum())
        merged.append([token for member in members for token in groups[member]])
    return merged, torch.stack(keys), torch.stack(sizes)
