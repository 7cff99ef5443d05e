"""Methods of several stages, their parts once more as plain loops over Python numbers, and by hand.

Shapes: N tokens in ROWS x COLUMNS, D features in HEADS heads, T words, K kept.
"""

import math

import mlx.core as mx
import numpy as np
import pytest
import torch

import torch_ref.pruners as ref
from mlx_vlm_prune.pruners import Signals, lookahead, resolve, window_merge
from torch_ref.pruners import lookahead as lookahead_twin

from .test_pruners_by_loops import (
    ARRAYS,
    COLUMNS,
    HEADS,
    QUERY,
    ROWS,
    D,
    N,
    T,
    Vector,
    X,
    assert_both_keep,
    cosine,
    first_best,
    heads,
    tokens,
)

pytestmark = pytest.mark.usefixtures("on_the_cpu_in_float64")
PIXELS, VALUES = tokens(3, 7, 2), tokens(8, 3, 1)
RAW = [1.0 + (i * 7) % 19 for i in range(N)]
WORDS = [[1.0 + (i * (5 + 2 * t) + 3 * t) % 23 for i in range(N)] for t in range(T)]
PAID = [[a / (2 * sum(row)) for a in row] for row in WORDS]  # half of it goes to words
RANK = [(i * 13 + 4) % N for i in range(N)]


@pytest.fixture(autouse=True)
def signals_of_these_methods(monkeypatch):
    for name, array in {
        "pixels_BND": np.array([PIXELS], np.float32),
        "entrance_BND": np.array([PIXELS], np.float32),
        "values_BNHd": heads(VALUES),
        "cls_value_BHd": heads([QUERY])[:, 0],
        "cls_row_BN": np.array([[a / sum(RAW) for a in RAW]], np.float32),
        "text_attention_BTN": np.array([PAID], np.float64),
        "cls_rank_BN": np.array([[r / N for r in RANK]], np.float32),
    }.items():
        monkeypatch.setitem(ARRAYS, name, array)


def farthest(x: list[Vector], K: int) -> list[int]:
    """In the order of choice."""
    apart = [[1 - cosine(u, v) for v in x] for u in x]
    kept = [first_best({i: min(apart[i][j] for j in range(N) if j != i) for i in range(N)})]
    while len(kept) < K:
        rest = [i for i in range(N) if i not in kept]
        kept.append(first_best({i: min(apart[i][j] for j in kept) for i in rest}))
    return kept


@pytest.mark.parametrize("K", [1, 4, 9, 17])
def test_flowcut_in_one_layer(K):
    d, alike = D // HEADS, [0.0] * N
    for h in range(HEADS):
        cls = QUERY[h * d : (h + 1) * d]
        row = [sum(a * b for a, b in zip(cls, v[h * d :], strict=False)) for v in VALUES]
        itself = sum(a * a for a in cls)
        top = max([itself, *row])
        total = sum(math.exp(x - top) for x in [itself, *row])
        alike = [a + math.exp(x - top) / total / HEADS for a, x in zip(alike, row, strict=True)]
    score = {}
    for i, value in enumerate(VALUES):
        length = sum(abs(sum(value[h * d + j] for h in range(HEADS)) / HEADS) for j in range(d))
        score[i] = (RAW[i] / sum(RAW) + alike[i] / sum(alike)) * length
    best = sorted(range(N), key=lambda i: (-round(score[i], 6), i))[:K]
    assert_both_keep("flowcut", K, sorted(best))


@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("K", [1, 3, 6, 11, 19])
def test_window_merge(K, side):
    given, cells = side, dict[tuple[int, int], list[int]]()
    while not cells or len(cells) > K:
        cells = {}
        for i in range(N):
            cells.setdefault((i // COLUMNS // side, i % COLUMNS // side), []).append(i)
        side += 1

    def likeness(members: list[int]) -> float:
        pairs = [cosine(X[i], X[j]) for i in members for j in members if i != j]
        return round(sum(pairs) / len(pairs), 10) if pairs else -1.0

    groups, leaving = list[list[int]](), N - K
    for members in sorted(cells.values(), key=lambda c: -likeness(c)):  # stable, as cells stand
        merged = 1 + min(leaving, len(members) - 1)
        leaving -= merged - 1
        groups += [members[:merged], *([i] for i in members[merged:])]
    anchors = {members[len(members) // 2]: members for members in groups}
    weight = {i: dict.fromkeys(members, 1 / len(members)) for i, members in anchors.items()}
    assert_both_keep(f"window_merge:side={given}", K, sorted(anchors), weight)


def test_windows_that_are_alike_merge_by_hand():
    """4 x 4 in windows of two: only the third is all alike. Of 16, 12 are left when 3 leave it and
    one the next most alike, where two of four are: the first two, of 6 pairs one."""
    a, b, c, d = np.eye(4, dtype=np.float32)
    x = [
        [a, b, a, a],
        [c, d, b, c],
        [b, b, d, a],
        [b, b, c, b],
    ]
    x_1ND = np.array(x).reshape(1, 16, 4)
    kept = resolve("window_merge:side=2")(Signals(mx.array(x_1ND), (4, 4)), 12)
    theirs = ref.reduce("window_merge", ref.Signals(torch.tensor(x_1ND), (4, 4)), 12, side=2)
    index = [0, 1, 3, 4, 5, 6, 7, 10, 11, 12, 14, 15]  # 3 stands for 2, 12 for 8, 9 and 13
    for index_BK, mixed_KN in (
        (kept.index_BK, np.array(kept.mixture(16)[0])),
        (theirs.index_BK, theirs.weight_BKN[0].numpy()),
    ):
        assert index_BK[0].tolist() == index
        assert np.flatnonzero(mixed_KN[2]).tolist() == [2, 3]
        assert np.flatnonzero(mixed_KN[9]).tolist() == [8, 9, 12, 13]
        np.testing.assert_allclose(mixed_KN.sum(axis=1), 1, rtol=1e-6)


def test_a_window_has_two_rows_at_least():
    with pytest.raises(ValueError, match="side is 1; a window has 2 rows"):
        window_merge.prune(Signals(mx.zeros((1, 4, 2)), (2, 2)), 2, side=1)


@pytest.mark.parametrize("relation", [1.0, 1.2])
@pytest.mark.parametrize("K", [1, 2, 3, 8, 15])
def test_dual_attention_keeps_what_the_highest_thresholds_that_leave_k_keep(K, relation):
    """By trying thresholds, as the authors give them, from high to low."""
    total = sum(map(sum, PAID))
    share = [sum(row[i] for row in PAID) / total for i in range(N)]
    most = [max(row[i] for row in PAID) for i in range(N)]
    key = sorted(range(N), key=lambda i: RANK[i])[: math.ceil(0.08 * N)]
    if len(key) >= K:
        return assert_both_keep(f"dual_attention:relation={relation}", K, sorted(key[:K]))
    for threshold in sorted({s / relation for s in share} | {*most}, reverse=True):
        rest = [
            i for i in range(N) if share[i] >= threshold * relation - 1e-12 or most[i] >= threshold
        ]
        if len({*rest, *key}) >= K:
            break
    assert len({*rest, *key}) == K  # no two at one threshold
    assert_both_keep(f"dual_attention:relation={relation}", K, sorted({*rest, *key}))


@pytest.mark.parametrize("K", [1, 2, 5, 9, 16])
def test_two_scales(K):
    by_tokens = farthest(X, max(1, int(K * 0.67 + 0.5)))
    more = [i for i in farthest(PIXELS, K) if i not in by_tokens]
    assert_both_keep("two_scales", K, sorted([*by_tokens, *more][:K]))


@pytest.mark.parametrize("K", [1, 4, 11])
def test_lookahead_keeps_the_farthest_and_raises_the_attention_to_all_others(K):
    kept = sorted(farthest(PIXELS, K))
    assert_both_keep("lookahead", K, kept)
    by_hand = [0.0 if i in kept else math.log(4) for i in range(N)]
    entrance, grid = ARRAYS["entrance_BND"], (ROWS, COLUMNS)
    ours = Signals(mx.array(entrance), grid, entrance_BND=mx.array(entrance))
    theirs = ref.Signals(torch.from_numpy(entrance), grid, entrance_BND=torch.from_numpy(entrance))
    np.testing.assert_allclose(np.array(lookahead.entry_bias(ours, K, boost=3))[0], by_hand)
    bias_BN = lookahead_twin.entry_bias(theirs, K, boost=3)
    np.testing.assert_allclose(bias_BN[0].numpy(), by_hand, rtol=1e-6)
