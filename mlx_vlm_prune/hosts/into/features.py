"""Pruning before the projector.

Shapes: N visual tokens of a picture, k kept of all pictures, D features.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ...pruners.contract import Reduction, Signals
from .family import project
from .parts import keep


def reduced(
    model: Any, seen: Sequence[Signals], budgets: Sequence[int]
) -> tuple[list[Reduction], mx.array]:
    """What is kept of each picture, and the embeddings (1, k, D) of all that is."""
    kept = [keep(one, K) for one, K in zip(seen, budgets, strict=True)]
    x = [which.apply(one.x_BND) for one, which in zip(seen, kept, strict=True)]
    return kept, project(model, mx.concatenate(x, axis=1))
