"""FlashVID (arXiv:2602.08024): chosen tokens of each frame, trees over frames, clusters in space.

One segment after another, each token's root by walking up its tree.
"""

import math
from collections import defaultdict
from itertools import pairwise

import torch
from torch import Tensor

from .clusters import distances
from .contract import Reduction, Signals, weighted_reduction
from .numerics import cosine, highest

needs = {"received_attention": "layer"}


def prune(
    signals: Signals, K: int, alpha: float = 0.7, cut: float = 0.9, merge: float = 0.8,
    segments: int = 8, layer: float = -1,
) -> Reduction:  # fmt: skip
    T = signals.frames
    budget = [(t + 1) * K // T - t * K // T for t in range(T)]
    counts = [math.ceil(alpha * k - 1e-9) for k in budget]
    pairs = []
    for x_ND, attention_N in zip(signals.x_BND, signals.received_attention_BN, strict=True):
        x_TnD = x_ND.double().reshape(T, -1, x_ND.shape[-1])
        parts = _segments(x_TnD, cut, segments)
        pairs.append(_of_clip(x_TnD, attention_N.double(), budget, counts, parts, merge))
    return weighted_reduction(signals, pairs)


def _of_clip(
    x_TnD: Tensor, attention_N: Tensor, budget: list[int], counts: list[int], parts: list[range],
    merge: float,
) -> tuple[list[int], Tensor]:  # fmt: skip
    T, n, _ = x_TnD.shape
    attention_Tn = attention_N.reshape(T, n)
    chosen = {
        t * n + i
        for t, count in enumerate(counts)
        for i in _attended_and_diverse(x_TnD[t], attention_Tn[t], count)
    }
    weight: dict[int, dict[int, float]] = {i: {i: 1.0} for i in chosen}
    for frames in parts:
        quota = sum(budget[t] - counts[t] for t in frames)
        root = _trees(x_TnD, frames, chosen, merge, quota)
        weight |= _clusters(x_TnD.flatten(0, 1), frames, n, root, quota)
    index = sorted(weight)
    weight_KN = torch.zeros(sum(budget), T * n, dtype=torch.float64)
    for slot, centre in enumerate(index):
        for token, share in weight[centre].items():
            weight_KN[slot, token] = share
    return index, weight_KN


def _attended_and_diverse(x_nD: Tensor, attention_n: Tensor, count: int) -> list[int]:
    apart_nn = 1 - cosine(x_nD)
    others_nn = apart_nn.clone().fill_diagonal_(math.inf)
    gap_n, kept = others_nn.min(dim=1).values, list[int]()
    for _ in range(count):
        score_n = (attention_n * gap_n).round(decimals=12)
        score_n[kept] = -1
        kept.append(int(score_n.argmax()))
        gap_n = apart_nn[kept].min(dim=0).values
    return kept


def _segments(x_TnD: Tensor, cut: float, segments: int) -> list[range]:
    mean_TD = x_TnD.mean(dim=1)
    unit_TD = mean_TD / mean_TD.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    alike_t = (unit_TD[1:] * unit_TD[:-1]).sum(dim=-1).round(decimals=12)
    least = alike_t.argsort(stable=True)[: segments - 1].tolist()
    begins = [0] + [t + 1 for t, a in enumerate(alike_t.tolist()) if a < cut or t in least]
    return [range(*ends) for ends in zip(begins, [*begins[1:], len(x_TnD)], strict=True)]


def _trees(
    x_TnD: Tensor, frames: range, chosen: set[int], merge: float, quota: int
) -> dict[int, int]:
    """The root of the tree of each token that is not chosen."""
    n = x_TnD.shape[1]
    free = [[i for i in range(t * n, t * n + n) if i not in chosen] for t in frames]
    x_ND, joins = x_TnD.flatten(0, 1), list[tuple[float, int, int]]()
    for before, here in pairwise(free):
        if before and here:
            best = cosine(x_ND[here], x_ND[before]).max(dim=1)
            for i, value, j in zip(here, best.values.tolist(), best.indices.tolist(), strict=True):
                if value > merge:
                    joins.append((-value, i, before[j]))
    room = sum(map(len, free)) - quota
    parent = {i: j for _, i, j in sorted(joins)[:room]}
    root: dict[int, int] = {}
    for i in (i for of_frame in free for i in of_frame):
        root[i] = root[parent[i]] if i in parent else i
    return root


def _clusters(
    x_ND: Tensor, frames: range, n: int, root: dict[int, int], quota: int
) -> dict[int, dict[int, float]]:  # fmt: skip
    """The shares of the tokens in each cluster, by its centre."""
    members = defaultdict[int, list[int]](list)
    for token, top in root.items():
        members[top].append(token)
    tops = [[i for i in range(t * n, t * n + n) if i in members] for t in frames]
    weight: dict[int, dict[int, float]] = {}
    for roots, count in zip(tops, _largest_remainders([*map(len, tops)], quota), strict=True):
        if not count:
            continue
        mean = torch.stack([x_ND[members[i]].mean(dim=0) for i in roots])
        of_centre = defaultdict[int, list[int]](list)
        for i, centre in zip(roots, _density_peaks(distances(mean), count), strict=True):
            of_centre[roots[centre]].append(i)
        for centre, some in of_centre.items():
            weight[centre] = {
                token: 1 / len(members[i]) / len(some) for i in some for token in members[i]
            }
    return weight


def _largest_remainders(parts: list[int], quota: int) -> list[int]:
    whole = max(sum(parts), 1)
    shares = [part * quota // whole for part in parts]
    order = sorted(range(len(parts)), key=lambda t: (-(parts[t] * quota % whole), t))
    for t in order[: quota - sum(shares)]:
        shares[t] += 1
    return shares


def _density_peaks(apart_nn: Tensor, count: int) -> list[int]:
    """The centre of each point's cluster."""
    k, n = min(count, 7), len(apart_nn)
    near_nk = apart_nn.sort(dim=-1).values[:, :k]
    density_n = -near_nk.square().mean(dim=-1).round(decimals=12)  # its log
    order = highest(density_n, n)
    reach_n = torch.full_like(density_n, float(apart_nn.max()))
    for rank, i in enumerate(order[1:], 1):
        reach_n[i] = apart_nn[i, order[:rank]].min()
    score_n = density_n + reach_n.clamp(min=1e-12).log()
    centres = sorted(highest(score_n.round(decimals=12), count))
    home = [centres[c] for c in apart_nn[:, centres].argmin(dim=1).tolist()]
    return [i if i in centres else h for i, h in enumerate(home)]
