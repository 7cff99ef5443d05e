"""PACT (arXiv:2504.08966): the least worthy are pruned, the rest clustered by their keys.

Shapes: N tokens, K kept, n clustered.
"""

import math

import torch
from torch import Tensor

from .budget import single
from .contract import Reduction, Signals, alike, best, mixed

needs: dict[str, str | None] = {"mean_attention": None}
proportional = True


def schedule(layers: int, N: int, K: int, layer: float = 4 / 32) -> dict[int, int]:
    return single(layers, N, K, layer)


def prune(signals: Signals, K: int, *, clustered: float = 0.5) -> Reduction:
    pairs, N = [], signals.x_BND.shape[1]
    n = K + int(clustered * (N - K))
    for x_ND, row_N, keys_ND in zip(
        signals.x_BND, signals.mean_attention_BN, signals.next_keys_BND, strict=True
    ):
        length = x_ND.double().square().sum(-1).sqrt()
        worth = (row_N.double() * length).round(decimals=12)
        pairs.append(grouped(worth, 1 - alike(keys_ND), K, n))
    return mixed(signals, pairs)


def grouped(worth_N: Tensor, apart_NN: Tensor, K: int, n: int) -> tuple[list[int], Tensor]:
    stay = best(worth_N, n)
    cutoff, middle = fewest(apart_NN[stay][:, stay], K)
    fill = [token for i, token in enumerate(stay) if i not in middle][: K - len(middle)]
    kept = sorted([stay[i] for i in middle] + fill)
    weight_KN = torch.zeros(K, len(worth_N), dtype=torch.float64)
    for i in range(len(worth_N)):
        home = i if i in kept else min(kept, key=lambda c: (apart_NN[c, i].item(), c))
        if i in kept or i in stay or apart_NN[home, i] <= 1.5 * cutoff:
            weight_KN[kept.index(home), i] = 1
    return kept, weight_KN / weight_KN.sum(dim=1, keepdim=True)


def fewest(apart_nn: Tensor, K: int) -> tuple[float, list[int]]:
    """The smallest cutoff that leaves at most K centres, and those."""
    low, high = -1e-6, 2.0
    for _ in range(21):
        middle = (low + high) / 2
        if len(centres(apart_nn, middle)) <= K:
            high = middle
        else:
            low = middle
    return high, centres(apart_nn, high)


def centres(apart_nn: Tensor, cutoff: float) -> list[int]:
    near_nn = (-(apart_nn / max(cutoff, 1e-6)).square()).exp()
    density = [round(v, 9) for v in near_nn.sum(dim=1).tolist()]
    found: list[int] = []
    for i in sorted(range(len(density)), key=lambda i: (-density[i], i)):
        if min((apart_nn[i, c].item() for c in found), default=math.inf) > cutoff:
            found.append(i)
    return found
