"""Every method once more, for parity: one file each, the same names and options.

`reduce` checks the budget and answers K = N, as the product's host does.
"""

import inspect
from types import ModuleType
from typing import Any

import torch

from . import attention_pool, avgpool, cls_attention, none, norm, random, similarity, uniform
from .contract import Reduction, Signals

METHODS: dict[str, ModuleType] = {
    "none": none,
    "random": random,
    "uniform": uniform,
    "avgpool": avgpool,
    "norm": norm,
    "similarity": similarity,
    "cls_attention": cls_attention,
    "attention_pool": attention_pool,
}

__all__ = ["METHODS", "Reduction", "Signals", "reduce", "wanted"]


def reduce(
    name: str,
    signals: Signals,
    K: int,
    learned: attention_pool.AttentionPool | None = None,
    **options: Any,
) -> Reduction:
    """K of N slots by the method `name`; K = N is the identity.

    `learned` holds a learned method's weights. Raises ValueError for a budget outside 1 to N
    and TypeError for an option the method lacks.
    """
    B, N, _ = signals.x_BND.shape
    if not 1 <= K <= N:
        raise ValueError(f"cannot keep {K} of {N} visual tokens; keep 1 to {N}")
    if K == N:
        return Reduction(torch.arange(N, device=signals.x_BND.device).expand(B, N))
    if learned is not None:
        return learned.prune(signals, K)
    return METHODS[name].prune(signals, K, **options)


def wanted(name: str, options: dict[str, Any]) -> dict[str, int]:
    """What the tower must hand over for a method, and of which layer."""
    if name != "cls_attention":
        return {}
    default = inspect.signature(cls_attention.prune).parameters["layer"].default
    return {"cls_attention": options.get("layer", default)}
