"""Pruning after the projector.

Shapes: N visual tokens of a picture, n of all pictures, k kept, D features.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ...pruners.contract import Reduction, Signals
from .family import project
from .parts import keep


def reduced(
    model: Any, seen: Sequence[Signals], budgets: Sequence[int]
) -> tuple[list[Reduction], mx.array]:
    """What is kept of each picture, and the embeddings (1, k, D) of all that is."""
    x_1nD = project(model, mx.concatenate([one.x_BND for one in seen], axis=1))
    ends = np.cumsum([one.x_BND.shape[1] for one in seen]).tolist()
    parts = zip(seen, [0, *ends], ends, strict=False)
    seen = [one.replace(x_BND=x_1nD[:, a:b]) for one, a, b in parts]
    kept = [keep(one, K) for one, K in zip(seen, budgets, strict=True)]
    x = [which.apply(one.x_BND) for one, which in zip(seen, kept, strict=True)]
    return kept, mx.concatenate(x, axis=1)
