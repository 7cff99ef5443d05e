"""ZOO-Prune (arXiv:2509.24837): how far a token moves the projector, and lies from the kept ones.

numpy draws the directions in both frameworks, so that both try the same.

Shapes: B images, N tokens, D features, K kept.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .contract import Reduction, Signals, index_reduction
from .numerics import cosine, scale_to_unit

needs: dict[str, str | None] = {"sensitivity": None}


def probe(
    project: Callable[[Tensor], Tensor], features_BND: Tensor, *,
    directions: int = 64, step: float = 0.01, seed: int = 0,
) -> Tensor:  # fmt: skip
    """The mean length of central differences, (B, N)."""
    drawn = np.random.default_rng(seed).standard_normal((directions, features_BND.shape[-1]))
    moves = []
    for direction in drawn:
        shift_D = torch.from_numpy(step * direction / np.linalg.norm(direction)).to(features_BND)
        ahead, behind = project(features_BND + shift_D), project(features_BND - shift_D)
        moves.append((ahead - behind).norm(dim=-1) / (2 * step))
    return torch.stack(moves).mean(dim=0)


def prune(signals: Signals, K: int) -> Reduction:
    images = zip(signals.x_BND, signals.sensitivity_BN, strict=True)
    return index_reduction(signals, [sensitive_and_apart(x, s, K) for x, s in images])


def sensitive_and_apart(x_ND: Tensor, moved_N: Tensor, K: int) -> list[int]:
    moved_N = moved_N.double()
    weight_N = scale_to_unit(moved_N)
    if moved_N.max() - moved_N.min() < 1e-3 * moved_N.max():
        weight_N = torch.ones_like(moved_N)
    apart_NN, kept = 1 - cosine(x_ND), [int(weight_N.argmax())]
    while len(kept) < K:
        score_N = apart_NN[kept].min(dim=0).values.clamp(min=0) * weight_N
        score_N[kept] = -torch.inf
        kept.append(int(score_N.argmax()))
    return sorted(kept)
