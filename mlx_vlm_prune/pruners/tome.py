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

from .contract import Reduction, Signals, Stage, identity, take
from .numerics import choosing, keep_highest
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
        kept = identity(keys_BNd)
        while kept.slots > K:
            merged = merge(keys_BNd, size_BN, K)
            keys_BNd, size_BN = merged.apply(keys_BNd), merged.sizes(size_BN)
            kept = merged.after(kept, N)
        return kept


def merge(keys_Bnd: mx.array, size_Bn: mx.array, K: int) -> Reduction:
    """One round: the most similar of A merge into B. The paper's token 0 is CLS: here B is even."""
    n = keys_Bnd.shape[1]
    a, b = mx.arange(1, n, 2), mx.arange(0, n, 2)
    similar_Ba, nearest_Ba = nearest(keys_Bnd[:, 1::2], keys_Bnd[:, ::2])
    r = min(n - K, len(a))
    merges_Ba = mx.argsort(mx.argsort(-similar_Ba, axis=-1), axis=-1) < r
    home_Ba = mx.where(merges_Ba, b[nearest_Ba], a)
    home_Bn = mx.broadcast_to(mx.arange(n), keys_Bnd.shape[:2])
    home_Bn[:, 1::2] = home_Ba.astype(home_Bn.dtype)
    stays_Bn = home_Bn == mx.arange(n)
    slot_Bn = take(mx.cumsum(stays_Bn, axis=1) - 1, home_Bn)
    return Reduction.merge(keep_highest(stays_Bn, n - r), slot_Bn, size_Bn)
