"""Token merging: in every layer the most similar tokens become one.

ToMe, Bolya et al., ICLR 2023, arXiv:2210.09461. Between attention and MLP the tokens are
dealt alternately into A and B; each of A finds the most similar of B by the cosine of
the keys (mean over heads), and the r most similar pairs merge into their mean, weighted
by how many patches each stands for. Later attention adds the log of that number
(proportional attention). The only method here that also makes the tower itself faster
layer by layer.

The first token is dealt into A: CLS, which stays, or in a tower without CLS the first patch; and
the next layer deals what is left of A, then B. (What is left of A stays in order beside CLS;
without it the least similar token is the last.)

As the authors' code (github.com/facebookresearch/ToMe@af95e4b). Differs: r may come from the
budget; where half of the tokens are too few for one round, rounds are repeated.

Options:
    r: tokens that merge in each layer until K are left; 0 spreads them over the layers
    inflect: with r = 0, how they are spread: -1 most in the first layers, which saves most time, 0
        evenly, 1 most in the last

Shapes: B images, n tokens, K left, a and b tokens in A and B, r of A merge and m do not, H heads,
d head size.
"""

from dataclasses import replace

import mlx.core as mx

from .contract import Reduction, Signals, Stage, take
from .numerics import choosing, unit
from .rows import nearest

stage = Stage.ENCODER
needs: dict[str, str | None] = {"keys": None}
proportional = True


def cuts(
    layers: int, N: int, K: int, *, r: int = 0, inflect: float = 0.0
) -> list[tuple[int, str, int]]:
    """After each layer's attention r tokens fewer, until K are left; with r = 0 a share of them."""
    if r < 0:
        raise ValueError(f"r is {r}; it is how many tokens merge in a layer, or 0")
    if not -1 <= inflect <= 1 or (r and inflect):
        raise ValueError(f"inflect is {inflect:g}; it is from -1 to 1, and 0 with r")
    done = [
        i / layers + inflect * i * (i - layers) / (layers * max(layers - 1, 1))
        for i in range(1, layers)
    ]
    left = [
        max(K, N - (r * i if r else int((N - K) * done[i - 1] + 1e-9))) for i in range(1, layers)
    ]
    return [(layer, "middle", n) for layer, n in enumerate([*left, K])]


def prune(signals: Signals, K: int) -> Reduction:
    """Merge to K tokens, in as few rounds as that takes."""
    with choosing():
        keys_BNd = signals.keys_BNHd.astype(mx.float32).mean(axis=2)
        N = keys_BNd.shape[1]
        size_BN = signals.get("size_BN")
        size_BN = mx.ones(keys_BNd.shape[:2]) if size_BN is None else size_BN
        kept = merge(keys_BNd, size_BN, signals.get("place_BN"), K, signals.has_cls)
        merged = kept
        while kept.slots > K:
            keys_BNd, size_BN = merged.apply(keys_BNd), merged.sizes(size_BN)
            merged = merge(keys_BNd, size_BN, merged.place_BK, K, signals.has_cls)
            kept = merged.after(kept, N)
        return replace(kept, place_BK=merged.place_BK)


def merge(
    keys_Bnd: mx.array, size_Bn: mx.array, place_Bn: mx.array | None, K: int, has_cls: bool
) -> Reduction:
    """One round: the most similar of A merge into B."""
    (B, n), unit_Bnd = keys_Bnd.shape[:2], unit(keys_Bnd)
    order_Bn = mx.broadcast_to(mx.arange(n), (B, n))
    if place_Bn is not None:
        order_Bn = mx.argsort(place_Bn, axis=-1)
        unit_Bnd = take(unit_Bnd, order_Bn)
    a, b = (slice(int(first), None, 2) for first in (has_cls, not has_cls))
    token_Ba, token_Bb = order_Bn[:, a], order_Bn[:, b]
    similar_Ba, nearest_Ba = nearest(unit_Bnd[:, a], unit_Bnd[:, b])
    r = min(n - K, n // 2)
    likest_Ba = mx.argsort(-similar_Ba, axis=-1)
    merging_Br, rest_Bm = likest_Ba[:, :r], likest_Ba[:, r:]
    token_Br, zero_Br = take(token_Ba, merging_Br), mx.broadcast_to(mx.array(0, mx.int32), (B, r))
    stays_Bn = mx.put_along_axis(mx.full((B, n), -1, mx.int32), token_Br, zero_Br, axis=1)
    slot_Bn = -1 - mx.cumsum(stays_Bn, axis=1)  # of those that stay
    if has_cls and rest_Bm.shape[1]:  # MLX 0.31.0 crashes when it sorts an empty array
        rest_Bm = mx.sort(rest_Bm, axis=-1)
    rest_Bm = take(token_Ba, rest_Bm)
    left_BK = take(slot_Bn, mx.concatenate([rest_Bm, token_Bb], axis=1))  # in the next order
    home_Br = take(slot_Bn, take(token_Bb, take(nearest_Ba, merging_Br)))
    slot_Bn = mx.put_along_axis(slot_Bn, token_Br, home_Br, axis=1)
    index_BK = mx.argsort(stays_Bn, axis=-1)[:, : n - r]
    return Reduction.merge(index_BK, slot_Bn, size_Bn, mx.argsort(left_BK, axis=-1))
