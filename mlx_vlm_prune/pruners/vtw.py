"""Drop all visual tokens at once, from one layer on.

Visual Tokens Withdrawal, Lin et al., AAAI 2025, arXiv:2405.05803. From one layer on no
visual token is left; positions are kept. The budget says which: with K of N in the
average layer, the K / N of the depth.

As the authors' code (github.com/lzhxmu/VTW@a3d8cfc) for the layer that it is given (15 of 32),
which counts from 0, as here. Differs: the layer follows from the budget, where theirs is searched
by calibration, the first after which the answer's logits hardly change; any number of images.

Shapes: I images, N tokens.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage
from .numerics import keep_highest

stage = Stage.DECODER


def schedule(layers: int, N: int, K: int) -> dict[int, int]:
    """None stay, from the layer that the budget gives."""
    layer = K * layers // N
    if not layer:
        raise ValueError(
            f"cannot keep {K} of {N} visual tokens in the average of {layers} layers, because the"
            f" first holds all; keep at least {-(-N // layers)}"
        )
    return {layer: 0}


def prune(signals: Signals, K: int) -> Reduction:
    """Keep the first K: by the schedule, none."""
    return Reduction(index_BK=keep_highest(mx.zeros(signals.x_BND.shape[:2]), K))
