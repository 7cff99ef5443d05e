"""Drop the tokens that a layer changes least.

V2Drop, Chen et al., CVPR 2026, arXiv:2509.01552. Tokens that change little from layer to
layer add nothing more: at three depths (3, 17 and 22 of 32) those with the
smallest L2 distance between a layer's output and its input leave; at the third all but one
do. Positions are kept; no attention is needed.

As the authors' code (github.com/xuyang-liu16/V2Drop@219e03e), whose layers in Qwen2-VL are 3, 16
and 22 of 28, the defaults there. Differs: the share that stays at the first two cuts is one share,
which follows from the budget (theirs is half; in Qwen2-VL a quarter, then a twentieth of that).

Options:
    first: layer of the language model before which tokens leave; below 1 a share of the depth
    second: the layer of the second cut, not before the first
    third: the layer from which one token is left, not before the second

Shapes: I images, N tokens, K kept, D features.
"""

import mlx.core as mx

from .budget import several_cuts
from .contract import Reduction, Signals, Stage
from .numerics import choosing, keep_highest, to_choice_dtype
from .pipeline import layer_at

stage = Stage.DECODER
needs: dict[str, str | None] = {"before": None}


def schedule(
    layers: int, N: int, K: int, *, first: float = 3 / 32, second: float = 17 / 32,
    third: float = 22 / 32,
) -> dict[int, int]:  # fmt: skip
    """The same share stays at the first cut and at the second; more than one token stays at the
    third only where both keep all."""
    cuts = (first, second, third)
    places = [layer_at(cut, layers) for cut in cuts]
    if places != sorted(places):
        raise ValueError(f"first, second and third are layers {places}; they must not descend")

    def counts(t: float) -> list[int]:
        share, rest = min(1.0, 2 * t), max(0.0, 2 * t - 1)
        return [max(1, int(n)) for n in (N * share, N * share**2, N * rest)]

    return several_cuts(layers, N, K, cuts, counts)


def prune(signals: Signals, K: int) -> Reduction:
    """Keep the K that changed most."""
    with choosing():
        change_BND = to_choice_dtype(signals.x_BND) - to_choice_dtype(signals.before_BND)
        change_BN = mx.square(change_BND).sum(axis=-1)
        return Reduction(keep_highest(change_BN, K), score_BN=change_BN)
