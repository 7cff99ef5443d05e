"""RESTORE (arXiv:2606.01711): kept tokens get the attention of those they replace.

Shapes: B images, N tokens, K kept, R dropped, P positions.
"""

import torch
from torch import Tensor

from .contract import Reduction, Signals, weighted_reduction
from .numerics import cosine, highest, nearest_slots


def calibrates(published: bool = False) -> bool:
    """Are biases those of the prompt alone?"""
    return published


def selected(K: int, published: bool = False) -> int:
    """How many of K slots the selector chooses."""
    return max(1, K // 2) if published else K


def complete(signals: Signals, kept: Reduction, K: int) -> Reduction:
    """The tokens that a selector chose, and means of the others."""
    assert kept.index_BK is not None and kept.weight_BKN is None
    images = zip(signals.x_BND.cpu(), kept.index_BK, strict=True)
    pairs = [with_means(x_ND, chosen.tolist(), K) for x_ND, chosen in images]
    return weighted_reduction(signals, pairs)


def with_means(x_ND: Tensor, chosen: list[int], K: int) -> tuple[list[int], Tensor]:
    """Index and weights (K, N) of one image."""
    rest = [i for i in range(len(x_ND)) if i not in set(chosen)]
    centres = anchors(cosine(x_ND[rest]), K - len(chosen))
    members: list[list[int]] = [[] for _ in centres]
    for i, slot in zip(rest, nearest_slots(x_ND[rest], centres), strict=True):
        members[slot].append(i)
    slots = {i: [i] for i in chosen} | {m[(len(m) - 1) // 2]: m for m in members}
    weight_KN = torch.zeros(K, len(x_ND))
    for k, i in enumerate(sorted(slots)):
        weight_KN[k, slots[i]] = 1 / len(slots[i])
    return sorted(slots), weight_KN


def anchors(similar_RR: Tensor, count: int) -> list[int]:
    """Dense tokens that are unlike all less dense ones."""
    density_R = similar_RR.mean(dim=1).round(decimals=12)
    score_R = density_R.clone()
    for i, row_R in enumerate(similar_RR):
        less_dense = row_R[density_R < density_R[i]]
        if len(less_dense):
            score_R[i] *= 1 - less_dense.max()
    return sorted(highest(score_R.round(decimals=12), count))


def attention_bias(
    signals: Signals, kept: Reduction, strength: float = 1.0, theta: float = 1e4,
    dims: int = 128, decay: bool = True, nearby: bool = False,
) -> Tensor:  # fmt: skip
    """What is added to the logits of the attention to each kept token, (B, K)."""
    assert kept.index_BK is not None
    bias_BK, patches_BN = torch.zeros(kept.index_BK.shape), signals.get("represented_BN")
    for b, x_ND in enumerate(signals.x_BND):
        index = kept.index_BK[b].tolist()
        homes = nearest_slots(x_ND, index)
        if nearby:
            homes = [
                min(range(len(index)), key=lambda k: abs(i - index[k])) for i in range(len(x_ND))
            ]
        for i, home in enumerate(homes):
            left = rotary_decay(abs(i - index[home]), theta, dims).clamp(min=0) if decay else 1
            bias_BK[b, home] += left * (1 if patches_BN is None else patches_BN[b, i])
    return strength * bias_BK.clamp(min=1).log().to(signals.x_BND.device)


def prompt_bias(signals: Signals, kept: Reduction, strength: float = 1.0) -> Tensor:
    """While a prompt is read: what is added to the attention to each slot, (B, K)."""
    assert kept.index_BK is not None
    if kept.weight_BKN is None:
        return torch.zeros(kept.index_BK.shape, device=signals.x_BND.device)
    return strength * (kept.weight_BKN > 0).sum(dim=2).float().log()


def calibration(
    N: int, K: int, positions: int, strength: float = 1.0, theta: float = 1e4, dims: int = 128,
    decay: bool = True,
) -> tuple[float, Tensor]:  # fmt: skip
    """While a prompt is read: what is added to kept tokens in the first layer, and by distance."""
    decay_P = torch.stack([rotary_decay(i, theta, dims) for i in range(positions)])
    distance_P = strength * (2 - (decay_P if decay else decay_P * 0 + 1)).log()
    return strength * float(torch.tensor(N / K).log()), distance_P


def rotary_decay(distance: int, theta: float, dims: int) -> Tensor:
    """What a distance leaves of a score: the mean of RoPE's cosines."""
    return (distance * torch.tensor([theta ** (-i / dims) for i in range(0, dims, 2)])).cos().mean()
