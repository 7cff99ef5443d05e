"""PruneSID once more as plain loops over Python numbers, from Jacobi's rotations on."""

import math
import operator

import numpy as np
import pytest

from .test_pruners_by_loops import (
    ATTENTION,
    D,
    N,
    Vector,
    X,
    assert_both_keep,
    cosine,
    first_best,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("on_the_cpu_in_float64")


def eigenvectors(matrix: list[Vector]) -> list[tuple[float, Vector]]:
    """Eigenvalues with their vectors, the largest first, by Jacobi's rotations."""
    n = len(matrix)
    a, v = [row[:] for row in matrix], [[float(i == j) for j in range(n)] for i in range(n)]
    for _ in range(60):
        for p in range(n):
            for q in range(p + 1, n):
                angle = math.atan2(2 * a[p][q], a[q][q] - a[p][p]) / 2
                c, s = math.cos(angle), math.sin(angle)
                for rows in (a, v):
                    for row in rows:
                        row[p], row[q] = c * row[p] - s * row[q], s * row[p] + c * row[q]
                for k in range(n):
                    a[p][k], a[q][k] = c * a[p][k] - s * a[q][k], s * a[p][k] + c * a[q][k]
    pairs = [(a[j][j], [v[i][j] for i in range(n)]) for j in range(n)]
    return sorted(pairs, reverse=True)


def product(a: list[Vector], b: list[Vector]) -> list[Vector]:
    columns = list(zip(*b, strict=True))
    return [[sum(map(operator.mul, row, column)) for column in columns] for row in a]


def turned(a: list[Vector]) -> list[Vector]:
    return [list(column) for column in zip(*a, strict=True)]


def orthonormal(a: list[Vector]) -> list[Vector]:
    """Columns of length one that span what the columns of a do, by Gram and Schmidt."""
    done: list[Vector] = []
    for column in turned(a):
        for _ in range(2):  # the second time what rounding left
            for other in done:
                along = sum(map(operator.mul, column, other))
                column = [x - along * y for x, y in zip(column, other, strict=True)]
        length = math.sqrt(sum(x * x for x in column))
        done.append([x / length for x in column])
    return turned(done)


def principal_shares(count: int) -> list[Vector]:
    """How much each token lies on each principal direction, by two sweeps from a drawn start."""
    sigmoid = [[1 / (1 + math.exp(-x)) for x in row] for row in X]
    a = [[x - sum(row) / D for x in row] for row in sigmoid]
    start = np.random.default_rng(0).standard_normal((D, count)).tolist()
    basis = orthonormal(product(a, start))
    for _ in range(2):
        basis = orthonormal(product(a, orthonormal(product(turned(a), basis))))
    along = product(turned(basis), a)
    vectors = [vector for _, vector in eigenvectors(product(along, turned(along)))]
    shares = [product(basis, turned([vector])) for vector in vectors]
    return [[round(abs(part[0]), 9) for part in parts] for parts in shares]


@pytest.mark.parametrize("K", [1, 4, 9, 12, 15])
def test_prunesid(K):
    directions = principal_shares(max(1, K // 4))
    group = [first_best({g: along[i] for g, along in enumerate(directions)}) for i in range(N)]
    pairs = [cosine(X[i], X[j]) for i in range(N) for j in range(i)]
    threshold = K / 32 * sum(pairs) / len(pairs)
    ranked, survivors = [], []
    for g in sorted(set(group)):
        members = sorted((i for i in range(N) if group[i] == g), key=lambda i: -ATTENTION[i])
        alive: list[int] = []
        for i in members:
            if all(cosine(X[i], X[j]) <= threshold for j in alive):
                alive.append(i)
        ranked.append(alive + [i for i in members if i not in alive])
        survivors.append(len(alive))
    most = [min(5, n) for n in survivors]
    while sum(most) < K:
        most = [min(n + 1, len(members)) for n, members in zip(most, ranked, strict=True)]
    ends = [
        round(sum(survivors[: g + 1]) * (K - len(ranked)) / sum(survivors))
        for g in range(len(ranked))
    ]
    seats = [min(1 + end - start, n) for start, end, n in zip([0, *ends], ends, most, strict=False)]
    for g in sorted(range(len(ranked)), key=lambda g: -survivors[g]):
        seats[g] += min(most[g] - seats[g], K - sum(seats))
    kept = [i for members, n in zip(ranked, seats, strict=True) for i in members[:n]]
    assert_both_keep("prunesid", K, sorted(kept))
