"""Token merging: in every layer the most similar tokens become one.

ToMe, Bolya et al., ICLR 2023, arXiv:2210.09461. Between attention and MLP the tokens are
dealt alternately into A and B; each of A finds the most similar of B by the cosine of
the keys (mean over heads), and the r most similar pairs merge into their mean, weighted
by how many patches each stands for. Later attention adds the log of that number
(proportional attention). The only method here that also makes the tower itself faster
layer by layer.

Differs from the authors' code: r may come from the budget (evenly over the layers), and
where half of the tokens are too few for one round, rounds are repeated.

Options:
    r: tokens that merge in each layer until K are left; 0 spreads them evenly over the layers

Shapes: B images, n tokens, K left, a and b tokens in A and B, H heads, d head size.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage, take
from .numerics import choosing, fused, unit
from .rows import nearest

stage = Stage.ENCODER
needs: dict[str, str | None] = {"keys": None}
proportional = True


def cuts(layers: int, N: int, K: int, *, r: int = 0) -> list[tuple[int, str, int]]:
    """After each layer's attention r tokens fewer, until K are left; with r = 0 evenly."""
    if r < 0:
        raise ValueError(f"r is {r}; it is how many tokens merge in a layer, or 0")
    left = [max(K, N - (r * i if r else (N - K) * i // layers)) for i in range(1, layers)]
    return [(layer, "middle", n) for layer, n in enumerate([*left, K])]


def prune(signals: Signals, K: int) -> Reduction:
    """Merge to K tokens, in as few rounds as that takes."""
    with choosing():
        keys_BNd = signals.keys_BNHd.astype(mx.float32).mean(axis=2)
        N = keys_BNd.shape[1]
        size_BN = signals.get("size_BN")
        size_BN = mx.ones(keys_BNd.shape[:2]) if size_BN is None else size_BN
        kept = merge(keys_BNd, size_BN, K)
        merged = kept
        while kept.slots > K:
            keys_BNd, size_BN = merged.apply(keys_BNd), merged.sizes(size_BN)
            merged = merge(keys_BNd, size_BN, K)
            kept = merged.after(kept, N)
        return kept


def merge(keys_Bnd: mx.array, size_Bn: mx.array, K: int) -> Reduction:
    """One round: the most similar of A merge into B. The paper's token 0 is CLS: here B is even."""
    (B, n), unit_Bnd = keys_Bnd.shape[:2], unit(keys_Bnd)
    similar_Ba, nearest_Ba = nearest(unit_Bnd[:, 1::2], unit_Bnd[:, ::2])
    r = min(n - K, n // 2)
    merging_Br = mx.argsort(-similar_Ba, axis=-1)[:, :r]
    token_Br, zero_Br = odd(merging_Br), mx.broadcast_to(mx.array(0, mx.int32), (B, r))
    stays_Bn = mx.put_along_axis(mx.full((B, n), -1, mx.int32), token_Br, zero_Br, axis=1)
    slot_Bn = -1 - mx.cumsum(stays_Bn, axis=1)  # of those that stay, which count -1 each
    home_Br = take(slot_Bn[:, ::2], take(nearest_Ba, merging_Br))
    slot_Bn = mx.put_along_axis(slot_Bn, token_Br, home_Br, axis=1)
    return Reduction.merge(mx.argsort(stays_Bn, axis=-1)[:, : n - r], slot_Bn, size_Bn)


@fused
def odd(number: mx.array) -> mx.array:
    """The odd number that has this one in the order of odd numbers, from 0."""
    return 2 * number + 1
