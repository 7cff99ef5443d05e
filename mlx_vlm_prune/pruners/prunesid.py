"""Keep the attended tokens of each principal direction that are unlike one another.

PruneSID, Fang et al., ICLR 2026, arXiv:2603.09480. Of the sigmoid of the features, less each
token's mean, K / 4 principal directions are taken; a token belongs to the one on which it lies
most. In a group, in the order of CLS attention, a token survives unless one that survived is more
similar than K / 32 times the image's mean similarity. Each group gets a seat, and the others in
proportion to its survivors, of at most 5 for every 64 of K; then it keeps its first survivors,
and after them the most attended of the others. The paper's budget for each image is the option
`budget=similarity` of any selector.

As the authors' code (github.com/ZhengyaoFang/PruneSID@4ef17d9) for LLaVA; the directions are those
of two sweeps from a random start, here always the same one. Differs: K counts the image's tokens,
theirs CLS too, which they hand on; for fewer than 8 tokens there is one group (theirs has none for
fewer than 4); directions of no size are left out, and those of one size get an order; shares of
seats are rounded from whole numbers, theirs from float32, and of groups with as many survivors the
first is filled first, theirs in any order; in Qwen2-VL theirs ranks by a token's share of its
direction and has other bounds, here all is as in LLaVA.

Tokens return to the host, once: a token survives by those that survived before it.

Options:
    layer: number of the tower's layer that is read; -1 is the last

Shapes: B images, N tokens, D features, K kept, G groups, n tokens of a group.
"""

from math import ceil

import mlx.core as mx
import numpy as np

from .contract import Reduction, Signals, Stage
from .numerics import on_host

stage = Stage.FEATURES
needs: dict[str, str | None] = {"cls_attention": "layer"}
SWEEPS = 2  # of the iteration that finds the directions
# Tokens grow by up to so much, each by another share: directions of one size have an order then,
# and are the same whatever library finds them.
NUDGE, GOLDEN = 1e-6, 0.5 * 5**0.5 - 0.5
LEAST = 1e-6  # of the largest direction's size: what is smaller is rounding


def prune(signals: Signals, K: int, *, layer: float = -1) -> Reduction:
    """Keep K; `layer` is read by the host. The choice is made in numpy, in float64."""
    x_BND, attention_BN = on_host(
        signals.x_BND.astype(mx.float32), signals.cls_attention_BN.astype(mx.float32)
    )
    images = zip(x_BND, attention_BN, strict=True)
    index_BK = np.stack([of_one_image(x_ND, attention_N, K) for x_ND, attention_N in images])
    return Reduction(mx.array(index_BK.astype(np.uint32)))


def of_one_image(x_ND: np.ndarray, attention_N: np.ndarray, K: int) -> np.ndarray:
    """Indices (K,), ascending."""
    length_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    unit_ND = x_ND / np.maximum(length_N1, 1e-6)
    threshold = K / 32 * mean_similarity(unit_ND)
    group_N, ranked, survivors = direction_of_each(x_ND, max(1, K // 4)), [], []
    for group in range(group_N.max() + 1):
        member_n = np.flatnonzero(group_N == group)
        member_n = member_n[np.argsort(-attention_N[member_n], kind="stable")]
        survives_n = surviving(unit_ND[member_n], attention_N[member_n], threshold)
        ranked.append(np.concatenate([member_n[survives_n], member_n[~survives_n]]))
        survivors.append(survives_n.sum())
    seat_G = seats(K, np.array([len(member_n) for member_n in ranked]), np.array(survivors))
    kept = [member_n[:count] for member_n, count in zip(ranked, seat_G, strict=True)]
    return np.sort(np.concatenate(kept))


def mean_similarity(unit_ND: np.ndarray) -> float:
    """The mean cosine similarity of two different tokens; 0 of a single one."""
    N, total_D = len(unit_ND), unit_ND.sum(axis=0)
    return float((total_D @ total_D - (unit_ND * unit_ND).sum()) / max(N * (N - 1), 1))


def direction_of_each(x_ND: np.ndarray, count: int) -> np.ndarray:
    """Of `count` principal directions the one on which each token lies most, (N,)."""
    a_ND = 0.5 + 0.5 * np.tanh(x_ND / 2)  # the sigmoid, without an overflow
    a_ND -= a_ND.mean(axis=1, keepdims=True)
    N, D = a_ND.shape
    a_ND *= 1 + NUDGE * (np.arange(N) * GOLDEN % 1)[:, None]
    tall = a_ND if N > D else a_ND.T
    start = np.random.default_rng(0).standard_normal((min(N, D), min(count, N, D)))
    basis = np.linalg.qr(tall @ start)[0]
    for _ in range(SWEEPS):
        basis = np.linalg.qr(tall @ np.linalg.qr(tall.T @ basis)[0])[0]
    left_GG, size_G, part_GN = np.linalg.svd(basis.T @ tall, full_matrices=False)
    part_GN = (basis @ left_GG).T if N > D else part_GN
    present = max(1, int((size_G > LEAST * size_G[0]).sum()))
    group_N: np.ndarray = np.abs(part_GN[:present]).round(9).argmax(axis=0)
    return group_N


def surviving(unit_nD: np.ndarray, attention_n: np.ndarray, threshold: float) -> np.ndarray:
    """Which tokens of a group, the most attended first, are like none that survived, (n,)."""
    left_n, survives_n = attention_n > 0, np.zeros(len(unit_nD), bool)
    for i in range(len(unit_nD)):
        if left_n[i]:
            survives_n[i] = True
            left_n &= (unit_nD @ unit_nD[i]).round(12) <= threshold
    return survives_n


def seats(K: int, member_G: np.ndarray, survivor_G: np.ndarray) -> np.ndarray:
    """How many tokens each group keeps, (G,): K together."""
    least_G = np.minimum(1, member_G)
    most_G = np.minimum(np.minimum(5 * ceil(K / 64), survivor_G), member_G)
    while most_G.sum() < K:
        most_G = np.minimum(most_G + 1, member_G)
    others = K - least_G.sum()
    share_G = np.rint(survivor_G.cumsum() * others / max(survivor_G.sum(), 1)).astype(int)
    seat_G = np.minimum(least_G + np.diff(share_G, prepend=0), most_G)
    for group in np.argsort(-survivor_G, kind="stable"):
        seat_G[group] += min(most_G[group] - seat_G[group], K - seat_G.sum())
    return seat_G
