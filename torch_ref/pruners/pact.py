"""PACT (arXiv:2504.08966): the least worthy are pruned, the rest clustered by their keys.

Shapes: N tokens, K kept, n clustered.
"""

import math

import torch
from torch import Tensor

from .budget import one_cut
from .contract import Reduction, Signals, weighted_reduction
from .numerics import cosine, highest

needs: dict[str, str | None] = {"mean_attention": None}
proportional = True


def schedule(layers: int, N: int, K: int, layer: float = 4 / 32) -> dict[int, int]:
    return one_cut(layers, N, K, layer)


def prune(
    signals: Signals, K: int, *, clustered: float = 0.55, cutoff: float = 0.0, prompt: bool = False
) -> Reduction:
    pairs, N = [], signals.x_BND.shape[1]
    n = max(K, int(clustered * N))
    share_BN = signals.prompt_attention_BN if prompt else signals.mean_attention_BN
    for x_ND, attention_N, keys_ND in zip(
        signals.x_BND, share_BN, signals.next_keys_BND, strict=True
    ):
        length_N = x_ND.double().square().sum(-1).sqrt()
        worth_N = (attention_N.double() * length_N).round(decimals=12)
        pairs.append(cluster(worth_N, 1 - cosine(keys_ND), K, n, cutoff))
    return weighted_reduction(signals, pairs)


def cluster(
    worth_N: Tensor, distance_NN: Tensor, K: int, n: int, cutoff: float
) -> tuple[list[int], Tensor]:
    """K clusters of the n most worthy tokens, as their centres and weights (K, N)."""
    worthy = highest(worth_N, n)
    distance_nn = distance_NN[worthy][:, worthy]
    cutoff = cutoff or smallest_cutoff(distance_nn, K)
    centres = spaced_centres(distance_nn, cutoff)[:K]
    others = [token for i, token in enumerate(worthy) if i not in centres]
    kept = sorted([worthy[i] for i in centres] + others[: K - len(centres)])
    weight_KN = torch.zeros(K, len(worth_N), dtype=torch.float64)
    for i in range(len(worth_N)):
        home = i if i in kept else min(kept, key=lambda c: (distance_NN[c, i].item(), c))
        if i in kept or i in worthy or distance_NN[home, i] <= 1.5 * cutoff:
            weight_KN[kept.index(home), i] = 1
    return kept, weight_KN / weight_KN.sum(dim=1, keepdim=True)


def smallest_cutoff(distance_nn: Tensor, K: int) -> float:
    """The smallest cutoff that leaves at most K centres."""
    low, high = -1e-6, 2.0
    for _ in range(21):
        middle = (low + high) / 2
        if len(spaced_centres(distance_nn, middle)) <= K:
            high = middle
        else:
            low = middle
    return high


def spaced_centres(distance_nn: Tensor, cutoff: float) -> list[int]:
    """Centres in the order of density, each farther than the cutoff from all before it."""
    near_nn = (-(distance_nn / 2).square()).exp()  # whatever the cutoff
    density = [round(v, 9) for v in near_nn.sum(dim=1).tolist()]
    centres: list[int] = []
    for i in sorted(range(len(density)), key=lambda i: (-density[i], i)):
        if min((distance_nn[i, c].item() for c in centres), default=math.inf) > cutoff:
            centres.append(i)
    return centres
