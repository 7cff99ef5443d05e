"""FlowCut (arXiv:2505.19536): scores of layers add up; in every second the lowest leave.

Shapes: B images, n tokens at present, K kept, H heads, d head size.
"""

import math

import torch
from torch import Tensor

from .contract import Reduction, Signals
from .numerics import keep_highest

needs: dict[str, str | None] = {"cls_row": None, "values": None, "cls_value": None}
ASSUMED = 0.9


def adapts(entropy: float = 0.0) -> bool:
    return entropy == 0


def cuts(layers: int, N: int, K: int, entropy: float = 0.0) -> list[tuple[int, str, int]]:
    """(layer, place, how many stay)."""
    plan, n, last = [], N, max(0, layers - 2)
    for layer in range(last + 1):
        n = stay(n, K, last - layer, entropy or ASSUMED)
        plan.append((layer, "middle", n))
    return plan


def stay(n: int, K: int, remaining: int, entropy: float) -> int:
    """How many of n stay; entropy is a share of the largest."""
    if remaining == 0:
        return K
    if remaining % 2 == 1:
        return n
    return max(K, n - round(round((n - K) * (1 - entropy**2) / math.sqrt(remaining), 9)))


def left(signals: Signals, K: int, remaining: int) -> int:
    """The same for one image by the entropy of CLS's attention."""
    share_n = signals.cls_row_BN[0].double()
    share_n = share_n / share_n.sum()
    entropy = torch.special.entr(share_n).sum().item() / max(math.log(len(share_n)), 1e-12)
    return stay(len(share_n), K, remaining, entropy)


def accumulate(signals: Signals) -> Tensor:
    """The scores so far, (B, n)."""
    scores = []
    for b, values_nHd in enumerate(signals.values_BNHd.double()):
        cls_Hd = signals.cls_value_BHd[b].double()
        product_Hn = torch.einsum("nhd,hd->hn", values_nHd, cls_Hd)
        all_HS = torch.cat([(cls_Hd**2).sum(-1, keepdim=True), product_Hn], dim=1)
        first = 1 if signals.has_cls else 0
        alike_n = all_HS[:, 1 - first :].softmax(-1).mean(0)[first:]
        attention_n = signals.cls_row_BN[b].double()
        both_n = sum(part_n / part_n.sum().clamp(min=1e-30) for part_n in (attention_n, alike_n))
        scores.append(both_n * values_nHd.mean(1).norm(p=1, dim=-1))
    before_BN, score_BN = signals.get("accumulated_BN"), torch.stack(scores)
    return score_BN if before_BN is None else torch.lerp(before_BN, score_BN, 0.5)


def prune(signals: Signals, K: int) -> Reduction:
    score_BN = signals.get("accumulated_BN")
    score_BN = accumulate(signals) if score_BN is None else score_BN
    return Reduction(keep_highest(score_BN.round(decimals=12), K))
