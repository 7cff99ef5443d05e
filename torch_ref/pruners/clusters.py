"""Density peaks over nearest neighbours: centres are dense and far from anything denser."""

import math

import torch
from torch import Tensor

from .numerics import highest


def distances(x_nD: Tensor) -> Tensor:
    """Euclidean distances divided by the root of D, to nine digits, (n, n)."""
    x_nD = x_nD.double()
    squares_nn = torch.stack([(x_nD - x_D).square().mean(-1) for x_D in x_nD])
    return squares_nn.sqrt().round(decimals=9)


def density_peaks(distance_nn: Tensor, C: int) -> list[int]:
    """The C points with the highest density times distance to a denser point, ascending. A point's
    density is that of the C nearest, itself among them; of all that its log."""
    n, density = len(distance_nn), []
    for row in distance_nn:
        density.append(round(-sum(d * d for d in sorted(row.tolist())[:C]) / C, 12))
    order = sorted(range(n), key=lambda i: (-density[i], i))
    score = torch.zeros(n, dtype=torch.float64)
    for rank, i in enumerate(order):
        reach = distance_nn[i, order[:rank]].min() if rank else distance_nn[i].max()
        score[i] = density[i] + math.log(max(float(reach), 1e-12))
    return sorted(highest(score.round(decimals=12), C))
