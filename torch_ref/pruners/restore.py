"""RESTORE (arXiv:2606.01711): kept tokens get the attention of those they replace.

Shapes: B images, N tokens, K kept.
"""

import torch
from torch import Tensor

from .contract import Reduction, Signals
from .numerics import nearest_slots


def attention_bias(
    signals: Signals, kept: Reduction, strength: float = 1.0, theta: float = 1e4,
    dims: int = 128, decay: bool = True, nearby: bool = False,
) -> Tensor:  # fmt: skip
    """What is added to the logits of the attention to each kept token, (B, K)."""
    assert kept.index_BK is not None
    rates = [theta ** (-i / dims) for i in range(0, dims, 2)]
    bias_BK = torch.zeros(kept.index_BK.shape)
    for b, x_ND in enumerate(signals.x_BND):
        index = kept.index_BK[b].tolist()
        homes = nearest_slots(x_ND, index)
        if nearby:
            homes = [
                min(range(len(index)), key=lambda k: abs(i - index[k])) for i in range(len(x_ND))
            ]
        for i, home in enumerate(homes):
            distance = abs(i - index[home]) * torch.tensor(rates)
            bias_BK[b, home] += distance.cos().mean().clamp(min=0) if decay else 1
    return strength * bias_BK.clamp(min=1).log().to(signals.x_BND.device)
