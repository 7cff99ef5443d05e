"""Clusters by density peaks: centres are dense and far from anything denser.

Rodriguez and Laio, Science 2014; with density from the nearest neighbours (DPC-KNN) Du et al.,
2016. In numpy, float64.

Shapes: n points, C centres.
"""

import numpy as np


def density_peaks(distance_nn: np.ndarray, C: int, neighbours: int = 5) -> np.ndarray:
    """The C points with the highest density times distance to a denser point, ascending."""
    n = len(distance_nn)
    near_nk = np.sort(distance_nn, axis=1)[:, 1 : min(neighbours, n - 1) + 1]
    density_n = np.exp(-(near_nk**2).mean(axis=1)) if n > 1 else np.ones(1)
    order = np.argsort(-density_n.round(12), kind="stable")
    reach_n = np.empty(n)  # distance to the nearest denser point
    for rank, i in enumerate(order):
        denser = order[:rank]
        reach_n[i] = distance_nn[i, denser].min() if rank else distance_nn[i].max()
    score_n = (density_n * reach_n).round(12)
    return np.sort(np.argsort(-score_n, kind="stable")[:C])


def nearest_centres(distance_nn: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The number of each point's nearest centre, (n,); a centre is its own."""
    home_n = np.argmin(distance_nn[:, centres], axis=1)
    home_n[centres] = np.arange(len(centres))
    return home_n


def distances(x_nD: np.ndarray) -> np.ndarray:
    """Euclidean distances divided by the root of D, to nine digits, (n, n).

    From differences, row by row: from squared lengths those of near-duplicates would be noise.
    """
    x_nD = x_nD.astype(np.float64)
    distance_nn = [np.sqrt(np.square(x_nD - x_D).mean(axis=1)) for x_D in x_nD]
    return np.array(distance_nn).round(9)
