"""Keep objects, by the attention of a middle layer, and the scene, by that of the last.

HiPrune, Liu et al., arXiv:2508.00553. Middle layers of a vision tower attend to objects,
deep ones to the whole. Anchors: the tokens that receive most attention (mean over heads
and queries) in the object layer, each with its four neighbours; together they take the share
`objects` of the budget. The rest of it goes to what receives most in the deep layer.

Anchors are K * `objects` / 5, rounded (a half to the even number): none up to 25 tokens, where
this is `received_attention`. The authors count layers from one: their 9 of LLaVA's 24 is layer 8
here, the default; their 16 of Qwen2.5-VL's 32 is layer 15, the default there.

As the authors' code (github.com/Danielement321/HiPrune@6e83a12). Differs: a neighbour outside the
grid is left out, where theirs wraps around to the next row, or counts as the first or last token;
where there are more neighbours than budget the first of the raster stay, where theirs fails.

Options:
    objects: share of K that goes to anchors and their neighbours, 0 to 1
    object_layer: layer of the tower whose attention finds objects; below 1 a share of the depth
    layer: number of the tower's layer that chooses the rest; -1 is the last

Shapes: B images, N tokens, K kept, A anchors.
"""

import operator
from functools import reduce

import mlx.core as mx

from .contract import Reduction, Signals, Stage
from .numerics import fused, keep_highest, mask_of

stage = Stage.FEATURES
needs = {"object_attention": "object_layer", "received_attention": "layer", "grid": None}
MORE_THAN_ATTENTION = 2.0


def prune(
    signals: Signals, K: int, *, objects: float = 0.1, object_layer: float = 0.33,
    layer: float = -1,
) -> Reduction:  # fmt: skip
    """Keep anchors with their neighbours, then the best of the rest."""
    if not 0 <= objects <= 1:
        raise ValueError(f"objects is {objects}; it is a share of K from 0 to 1")
    (B, N), grid = signals.object_attention_BN.shape, signals.grid
    anchors_BA = keep_highest(signals.object_attention_BN, round(K * objects / 5))
    is_anchor = mask_of(anchors_BA, N).reshape(B, *grid)
    padded = mx.pad(is_anchor, [(0, 0), (1, 1), (1, 1)])
    is_object_BN = any_of(
        is_anchor, padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2],
        padded[:, 1:-1, 2:],
    ).reshape(B, N)  # fmt: skip
    score_BN = mx.where(is_object_BN, MORE_THAN_ATTENTION, signals.received_attention_BN)
    score_BN = mx.where(is_anchor.reshape(B, N), mx.inf, score_BN)
    return Reduction(keep_highest(score_BN, K), score_BN=score_BN)


@fused
def any_of(*masks: mx.array) -> mx.array:
    """Which entries are marked in any of some masks."""
    return reduce(operator.or_, masks)
