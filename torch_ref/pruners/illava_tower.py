"""iLLaVA's encoder part (arXiv:2412.06263): the most attended stay, the last recycle others.

Shapes: N tokens, K kept, R leave, D features.
"""

import torch
from torch import Tensor

from .contract import Reduction, Signals, index_reduction, layer_at
from .numerics import highest

needs: dict[str, str | None] = {"layer_attention": None}


def cuts(
    layers: int, N: int, K: int, start: float = 5 / 32, end: float = 13 / 32, stages: int = 3
) -> list[tuple[int, str, int]]:
    first, last = layer_at(start, layers), layer_at(end, layers)
    plan: list[tuple[int, str, int]] = []
    for i in range(stages):
        layer = first if stages == 1 else first + i * (last - first) // (stages - 1)
        plan = [cut for cut in plan if cut[0] != layer]
        plan.append((layer, "middle", N - (i + 1) * (N - K) // stages))
    return plan


def leaves(N: int, K: int, share: float = 0.4) -> int:
    return N - int(share * (N - K))


def prune(signals: Signals, K: int, recycled: float = 0.05) -> Reduction:
    return recycle(signals, signals.layer_attention_BN, K, recycled)


def recycle(signals: Signals, score_BN: Tensor, K: int, recycled: float) -> Reduction:
    """The K highest; the last of them are mixed with what leaves."""
    value_BND, chosen = signals.x_BND.clone(), []
    for b, score_N in enumerate(score_BN.double().round(decimals=12)):
        order = highest(score_N, len(score_N))
        x_ND, leaving = signals.x_BND[b].double(), order[K:]
        for centre in order[K - max(1, round(K * recycled)) : K]:
            value_BND[b, centre] = (x_ND[centre] + taken_in(x_ND[centre], x_ND[leaving])) / 2
        chosen.append(sorted(order[:K]))
    return Reduction(index_reduction(signals, chosen).index_BK, value_BND=value_BND)


def taken_in(x_D: Tensor, leaving_RD: Tensor) -> Tensor:
    """The mixture of the five that x has the largest products with."""
    product_R = (leaving_RD @ x_D).round(decimals=12)
    likest = highest(product_R, 5)
    share_M = torch.softmax(product_R[likest] / x_D.shape[0] ** 0.5, dim=0)
    return share_M @ leaving_RD[likest]
