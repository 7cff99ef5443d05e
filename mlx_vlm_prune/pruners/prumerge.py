"""Keep the tokens that CLS looks at; each takes up its neighbours.

LLaVA-PruMerge, Shang et al., ICCV 2025, arXiv:2403.15388. The score is the softmax of CLS's
query with the keys, heads together as one. Every kept token adds its 32 nearest (by the
cosine of the keys), each times its score; one more token is the sum of all dropped ones,
each times its score.

Differs from the authors' code: the budget is K (theirs counts outliers, about 32 in the
mean: see `prumerge_plus`), the last slot being that sum, at the place of the strongest
token dropped; neighbours are added as the tower made them, not as already changed by
merges before; slots stay in raster order.

Shapes: B images, N tokens, K kept, M neighbours, D features.
"""

from collections.abc import Callable

import mlx.core as mx

from .contract import Reduction, Signals, Stage, cosine, keep_highest, rounded, take, to_float64

stage = Stage.FEATURES
needs = {"cls_query": "layer", "keys": "layer"}


def prune(signals: Signals, K: int, *, neighbours: int = 32, layer: float = -1) -> Reduction:
    """Keep K - 1 and a sum of the rest; `layer` is read by the host."""
    return absorbed(signals, K, neighbours, lambda score_BN: keep_highest(score_BN, max(1, K - 1)))


def absorbed(
    signals: Signals, K: int, neighbours: int, choose: Callable[[mx.array], mx.array]
) -> Reduction:
    """The tokens that are chosen by their scores (B, N), with their neighbours."""
    if neighbours < 0:
        raise ValueError(f"neighbours is {neighbours}; it must be 0 or more")
    with mx.stream(mx.cpu):
        score_BN = scores(signals)
        return merged(signals, score_BN, choose(score_BN), K, neighbours)


def scores(signals: Signals) -> mx.array:
    """Softmax of CLS's query with every key, (B, N) float64. On the CPU."""
    query_BD1 = to_float64(signals.cls_query_BHd).flatten(1)[..., None]
    keys_BND = to_float64(signals.keys_BNHd).flatten(2)
    logits_BN = (keys_BND @ query_BD1)[..., 0] / keys_BND.shape[-1] ** 0.5
    power_BN = mx.power(mx.array(EULER, mx.float64), logits_BN - logits_BN.max(-1, keepdims=True))
    return rounded(power_BN / power_BN.sum(axis=-1, keepdims=True))


EULER = 2.718281828459045  # mx.exp has the precision of float32, even in float64


def merged(
    signals: Signals, score_BN: mx.array, kept_BT: mx.array, K: int, neighbours: int
) -> Reduction:
    """The kept tokens with their neighbours, and where T < K the sum of the rest. On the CPU."""
    N, T = score_BN.shape[1], kept_BT.shape[1]
    similar_BNN = cosine(signals.keys_BNHd.astype(mx.float32).flatten(2))
    similar_BNN = mx.where(mx.eye(N) > 0, -mx.inf, similar_BNN)
    order_BTN = mx.argsort(-take(similar_BNN, kept_BT), axis=-1)
    near_BTN = mx.argsort(order_BTN, axis=-1) < min(neighbours, N - 1)
    own_BTN = kept_BT[..., None] == mx.arange(N)
    weight_BTN = own_BTN + near_BTN * score_BN[:, None].astype(mx.float32)
    if T == K:
        return Reduction(kept_BT, weight_BTN)
    dropped_BN = mx.where(own_BTN.any(axis=1), -1, score_BN)
    last_B1 = mx.argmax(dropped_BN, axis=-1, keepdims=True).astype(kept_BT.dtype)
    rest_B1N = mx.maximum(dropped_BN, 0)[:, None].astype(mx.float32)
    index_BK = mx.concatenate([kept_BT, last_B1], axis=1)
    order_BK = mx.argsort(index_BK, axis=1)
    return Reduction(
        take(index_BK, order_BK), take(mx.concatenate([weight_BTN, rest_B1N], axis=1), order_BK)
    )
