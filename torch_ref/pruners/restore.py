"""RESTORE (arXiv:2606.01711): kept tokens get the attention of those they replace.

Shapes: B images, N tokens, K kept.
"""

import torch
from torch import Tensor

from .contract import Reduction, Signals
from .numerics import nearest_slots


def attention_bias(
    signals: Signals, kept: Reduction, strength: float = 1.0, theta: float = 1e4, dims: int = 128
) -> Tensor:
    """What is added to the logits of the attention to each kept token, (B, K)."""
    assert kept.index_BK is not None
    rates = [theta ** (-i / dims) for i in range(0, dims, 2)]
    bias_BK = torch.zeros(kept.index_BK.shape)
    for b, x_ND in enumerate(signals.x_BND):
        index = kept.index_BK[b].tolist()
        for i, home in enumerate(nearest_slots(x_ND, index)):
            distance = abs(i - index[home]) * torch.tensor(rates)
            bias_BK[b, home] += distance.cos().mean().clamp(min=0)
    return strength * bias_BK.clamp(min=1).log().to(signals.x_BND.device)
