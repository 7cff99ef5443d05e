"""PruneSID (arXiv:2603.09480): of each principal direction the attended tokens that are unlike.

numpy draws the start of the directions in both frameworks, so that both begin alike.

Shapes: N tokens, D features, K kept, G groups.
"""

import math

import numpy as np
import torch
from torch import Tensor

from .contract import Reduction, Signals, index_reduction
from .numerics import cosine

needs: dict[str, str | None] = {"cls_attention": "layer"}


def prune(signals: Signals, K: int, *, layer: float = -1) -> Reduction:
    images = zip(signals.x_BND, signals.cls_attention_BN, strict=True)
    return index_reduction(signals, [of_image(x, a.tolist(), K) for x, a in images])


def of_image(x_ND: Tensor, attention: list[float], K: int) -> list[int]:
    similar_NN = cosine(x_ND)
    N = len(x_ND)
    pairs = similar_NN.triu(diagonal=1).sum() / max(1, N * (N - 1) // 2)
    threshold = float(pairs) * K / 32
    groups: dict[int, list[int]] = {}
    for token, group in enumerate(strongest_component(x_ND.double(), max(1, K // 4))):
        groups.setdefault(group, []).append(token)
    ranked, survivors = [], []
    for group in sorted(groups):
        members = sorted(groups[group], key=lambda token: -attention[token])
        first = suppress(members, similar_NN, attention, threshold)
        ranked.append(first + [token for token in members if token not in first])
        survivors.append(len(first))
    shares = share_out(K, [len(members) for members in ranked], survivors)
    return sorted(t for members, n in zip(ranked, shares, strict=True) for t in members[:n])


def strongest_component(x_ND: Tensor, count: int) -> list[int]:
    """The principal component on which each token lies most: torch's `pca_lowrank` of the sigmoid,
    with a start of its own."""
    matrix_DN = torch.sigmoid(x_ND).T
    matrix_DN = matrix_DN - matrix_DN.mean(dim=0)
    D, N = matrix_DN.shape
    golden = (math.sqrt(5) - 1) / 2
    matrix_DN = matrix_DN * torch.tensor(
        [1 + 1e-6 * (i * golden % 1) for i in range(N)], dtype=torch.float64
    )
    start = torch.from_numpy(
        np.random.default_rng(0).standard_normal((min(D, N), min(count, N, D)))
    )
    tall = matrix_DN if D >= N else matrix_DN.T
    basis = torch.linalg.qr(tall @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(tall.T @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    U, size_G, Vh = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    component_GN = Vh if D >= N else (basis @ U).T
    is_present = size_G > 1e-6 * size_G[0]
    is_present[0] = True
    return component_GN[is_present].abs().round(decimals=9).argmax(dim=0).tolist()


def suppress(
    members: list[int], similar_NN: Tensor, attention: list[float], threshold: float
) -> list[int]:
    """Of the members, the most attended first, those that are like none taken before."""
    taken: list[int] = []
    for token in members:
        if attention[token] > 0 and all(similar_NN[token, t] <= threshold for t in taken):
            taken.append(token)
    return taken


def share_out(K: int, members: list[int], survivors: list[int]) -> list[int]:
    """How many of K each group keeps."""
    most = [min(5 * math.ceil(K / 64), s, m) for s, m in zip(survivors, members, strict=True)]
    while sum(most) < K:
        most = [min(n + 1, m) for n, m in zip(most, members, strict=True)]
    others, total = K - len(members), max(1, sum(survivors))
    ends = [round(sum(survivors[: g + 1]) * others / total) for g in range(len(members))]
    starts = [0, *ends[:-1]]
    shares = [min(1 + end - start, n) for start, end, n in zip(starts, ends, most, strict=True)]
    for group in sorted(range(len(members)), key=lambda g: -survivors[g]):
        shares[group] += min(most[group] - shares[group], K - sum(shares))
    return shares
