"""IVC-Prune's anchors (arXiv:2602.03060), by positions alone, join what a selector keeps.

Shapes: N tokens.
"""

import torch
from torch import Tensor

from .contract import Reduction, Signals, index_reduction

needs: dict[str, str | None] = {"rotation": None}


def selected(K: int, anchors: float = 0.4) -> int:
    """How many of K tokens the selector chooses."""
    return max(1, K - round(K * anchors))


def complete(signals: Signals, kept: Reduction, K: int) -> Reduction:
    """The tokens that a selector chose, and anchors in turn by cosine and by sine."""
    assert kept.index_BK is not None and kept.weight_BKN is None
    index = []
    for b, chosen in enumerate(kept.index_BK.tolist()):
        ranks = anchor_ranks(signals.rotary_cosine_BN[b], signals.rotary_sine_BN[b])
        others = sorted(set(range(len(ranks))) - set(chosen), key=lambda i: (ranks[i], i))
        index.append(sorted(chosen + others[: K - len(chosen)]))
    return index_reduction(signals, index)


def anchor_ranks(cosine_N: Tensor, sine_N: Tensor) -> list[int]:
    """Each token's place by its cosine or by its sine, the better one."""
    places = []
    for mean_N in (cosine_N, sine_N):
        order = mean_N.double().round(decimals=6).argsort(descending=True, stable=True)
        places.append(order.argsort())
    return torch.minimum(*places).tolist()
