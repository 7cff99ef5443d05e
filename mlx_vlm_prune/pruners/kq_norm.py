"""Keep the patches with the longest keys and queries at one layer of the tower.

Vision-Token-Pruning (github.com/denis7-jean/ece1512-projectA) as its README describes it;
no commit of it has this code (what it has is `patch_norm`), so layer and sum are ours:
the norm of the key plus that of the query, all heads together, at half depth, after
the attention that they serve.

Options:
    layer: layer of the tower after whose attention patches leave; below 1 a share of the depth

Shapes: B images, N patches, H heads, d head size, K kept.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage
from .numerics import choosing, keep_highest, rounded, to_choice_dtype
from .pipeline import layer_at

stage = Stage.ENCODER
needs: dict[str, str | None] = {"keys": None, "queries": None}


def cuts(layers: int, N: int, K: int, *, layer: float = 0.5) -> list[tuple[int, str, int]]:
    """Once, between attention and MLP of `layer`."""
    return [(layer_at(layer, layers), "middle", K)]


def prune(signals: Signals, K: int) -> Reduction:
    """Keep the K longest."""
    with choosing():
        score_BN = rounded(norm(signals.keys_BNHd) + norm(signals.queries_BNHd))
        return Reduction(keep_highest(score_BN, K), score_BN=score_BN)


def norm(x_BNHd: mx.array) -> mx.array:
    """L2 norm of each token, all heads together, (B, N)."""
    return mx.sqrt(mx.square(to_choice_dtype(x_BNHd)).sum(axis=(2, 3)))
