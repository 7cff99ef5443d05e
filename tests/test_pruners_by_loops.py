"""Methods with a closed description, once more as plain loops over Python numbers.

Tokens come from formulas, not from a generator, so what is expected can be recomputed
by hand. Nothing here uses an array library to decide anything.
"""

import math

import mlx.core as mx
import numpy as np
import pytest
import torch

import torch_ref.pruners as ref
from mlx_vlm_prune.models.decoder import attention
from mlx_vlm_prune.pruners import Signals, resolve

from .pruner_cases import completed_reduction

pytestmark = pytest.mark.usefixtures("on_the_cpu_in_float64")
ROWS, COLUMNS, D, HEADS, T = 4, 5, 6, 2, 3
N = ROWS * COLUMNS
Vector = list[float]


def tokens(a: int, b: int, c: int, count: int = N) -> list[Vector]:
    """Integers from -6 to 6 by a formula."""
    return [
        [(a * i + b * d + c * i * d + i * i) % 13 - 6.0 for d in range(D)] for i in range(count)
    ]


X, KEYS, QUERY, TEXT = tokens(7, 3, 5), tokens(4, 9, 2), tokens(5, 2, 1, 1)[0], tokens(3, 8, 6, T)
CLS_KEY = tokens(2, 3, 7, 1)[0]
RAW = [1.0 + (i * 11) % 17 for i in range(N)]
ATTENTION = [a / sum(RAW) for a in RAW]
VALUES, TEXT_VALUES = tokens(3, 4, 8), tokens(6, 5, 2, T)
# Of RoPE with three frequencies, where the image begins behind two words.
RATES, START = (1.0, 0.1, 0.01), 2
COSINE = [sum(math.cos((START + i) * rate) for rate in RATES) / 3 for i in range(N)]
SINE = [sum(math.sin((START + i) * rate) for rate in RATES) / 3 for i in range(N)]


def cosine(u: Vector, v: Vector) -> float:
    length = math.sqrt(sum(a * a for a in u)) * math.sqrt(sum(b * b for b in v))
    return round(sum(a * b for a, b in zip(u, v, strict=True)) / length, 12)


def first_best(scores: dict[int, float]) -> int:
    """The key of the highest value; of equals the lowest."""
    return min(scores, key=lambda i: (-scores[i], i))


def mean_key(i: int) -> Vector:
    """The mean over heads."""
    d = D // HEADS
    return [sum(KEYS[i][h * d + j] for h in range(HEADS)) / HEADS for j in range(d)]


def heads(vectors: list[Vector]) -> np.ndarray:
    return np.array(vectors, np.float32).reshape(1, -1, HEADS, D // HEADS)


ARRAYS = {
    "grid": (ROWS, COLUMNS),
    "x_BND": np.array([X], np.float32),
    "keys_BNHd": heads(KEYS),
    "cls_query_BHd": heads([QUERY])[:, 0],
    "cls_key_BHd": heads([CLS_KEY])[:, 0],
    "cls_attention_BN": np.array([ATTENTION], np.float32),
    "received_attention_BN": np.array([ATTENTION[::-1]], np.float32),
    "sensitivity_BN": np.array([[a * a for a in ATTENTION]], np.float32),
    "text_BTD": np.array([TEXT], np.float32),
    "text_real_BT": np.ones((1, T), bool),
    "normed_BND": np.array([X], np.float32),
    "keys_BND": np.array([KEYS], np.float32),
    "text_keys_BTD": np.array([tokens(2, 5, 3, T)], np.float32),
    "held_values_BNHd": heads(VALUES),
    "text_values_BTHd": heads(TEXT_VALUES),
    "rotary_cosine_BN": np.array([COSINE], np.float32),
    "rotary_sine_BN": np.array([SINE], np.float32),
}


def both_frameworks(spec: str, K: int) -> list[tuple[list[int], np.ndarray]]:
    """Index and weights from the product and from the reference."""
    pruner = resolve(spec)
    ours = pruner(Signals(**{k: v if k == "grid" else mx.array(v) for k, v in ARRAYS.items()}), K)
    signals = ref.Signals(
        **{k: v if k == "grid" else torch.from_numpy(v) for k, v in ARRAYS.items()}
    )
    theirs = completed_reduction(pruner, signals, K)
    of_mlx = (np.array(ours.index_BK[0]).tolist(), np.array(ours.mixture(N)[0]))
    weight = torch.eye(N)[theirs.index_BK[0]] if theirs.weight_BKN is None else theirs.weight_BKN[0]
    return [of_mlx, (theirs.index_BK[0].tolist(), weight.numpy())]


def assert_both_keep(
    spec: str, K: int, index: list[int], weight: dict[int, dict[int, float]] | None = None
):
    """Both keep `index`, and where `weight` is given mix slot by slot like that."""
    for kept, mixed in both_frameworks(spec, K):
        assert kept == index
        for slot, token in enumerate(index):
            row = {token: 1.0} if weight is None else weight[token]
            by_hand = [row.get(j, 0.0) for j in range(N)]
            np.testing.assert_allclose(mixed[slot], by_hand, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("K", [1, 4, 9, 16])
def test_divprune(K):
    apart = [[1 - cosine(u, v) for v in X] for u in X]
    alone = {i: min(apart[i][j] for j in range(N) if j != i) for i in range(N)}
    kept = [first_best(alone)]
    while len(kept) < K:
        gaps = {i: min(apart[i][j] for j in kept) for i in range(N) if i not in kept}
        kept.append(first_best(gaps))
    assert_both_keep("divprune", K, sorted(kept))


def determinant(matrix: list[Vector]) -> float:
    """By expansion along the first row."""
    if not matrix:
        return 1.0
    total = 0.0
    for j, a in enumerate(matrix[0]):
        minor = [row[:j] + row[j + 1 :] for row in matrix[1:]]
        total += (-1) ** j * a * determinant(minor)
    return total


@pytest.mark.parametrize("K", [1, 2, 3, 4, 5])
def test_cdpruner_grows_the_set_whose_determinant_is_largest(K):
    nearest = [sum(cosine(x, t) for t in TEXT) / T for x in X]
    relevance = [(r - min(nearest)) / (max(nearest) - min(nearest)) + 1e-6 for r in nearest]
    kernel = [
        [relevance[i] * cosine(X[i], X[j]) * relevance[j] for j in range(N)] for i in range(N)
    ]
    kept: list[int] = []
    for _ in range(K):
        volume = {
            i: determinant([[kernel[a][b] for b in [*kept, i]] for a in [*kept, i]])
            for i in range(N)
            if i not in kept
        }
        kept.append(first_best(volume))
    assert_both_keep("cdpruner", K, sorted(kept))


@pytest.mark.parametrize("K", [1, 5, 12])
def test_scope(K):
    kept: list[int] = []
    for _ in range(K):
        gains = {}
        for i in (i for i in range(N) if i not in kept):
            gain = 0.0
            for u in X:
                covered = max([0.0, *(cosine(u, X[j]) for j in kept)])
                gain += max(cosine(u, X[i]) - covered, 0.0)
            gains[i] = gain * ATTENTION[i]
        kept.append(first_best(gains))
    assert_both_keep("scope", K, sorted(kept))


@pytest.mark.parametrize("K", [1, 2, 5, 12])
def test_salience_coverage(K):
    kept: list[int] = []
    for _ in range(K):
        score = {}
        for i in (i for i in range(N) if i not in kept):
            gap = min((1 - cosine(X[i], X[j]) for j in kept), default=1.0)
            score[i] = gap * ATTENTION[N - 1 - i] ** 0.8
        kept.append(first_best(score))
    assert_both_keep("salience_coverage", K, sorted(kept))


@pytest.mark.parametrize("K", [1, 2, 5, 12])
def test_zoo_prune(K):
    moved = [np.float32(a * a).item() for a in ATTENTION]
    weight = [(m - min(moved)) / (max(moved) - min(moved)) for m in moved]
    kept = [first_best(dict(enumerate(weight)))]
    while len(kept) < K:
        scores = {}
        for i in (i for i in range(N) if i not in kept):
            scores[i] = weight[i] * max(min(1 - cosine(X[i], X[j]) for j in kept), 0)
        kept.append(first_best(scores))
    assert_both_keep("zoo_prune", K, sorted(kept))


@pytest.mark.parametrize("K", [2, 6, 13])
def test_prumerge(K):
    keys = [CLS_KEY, *KEYS]
    logits = [sum(q * k for q, k in zip(QUERY, key, strict=True)) / math.sqrt(D) for key in keys]
    score = [math.exp(x) / sum(math.exp(y) for y in logits) for x in logits][1:]
    order = sorted(range(N), key=lambda i: (-round(score[i], 12), i))
    kept, dropped = order[: K - 1], order[K - 1 :]
    weight = {}
    for i in kept:
        others = [j for j in range(N) if j != i]
        nearest = sorted(others, key=lambda j: (-cosine(KEYS[i], KEYS[j]), j))[:5]
        weight[i] = {i: 1.0, **{j: score[j] for j in nearest}}
    weight[dropped[0]] = {j: score[j] for j in dropped}
    assert_both_keep("prumerge:neighbours=5", K, sorted(weight), weight)


@pytest.mark.parametrize("K", [3, 8, 15])
def test_visionzip(K):
    C = min(int(K * 10 / 64 + 0.5), K - 1)
    dominant = sorted(range(N), key=lambda i: (-ATTENTION[i], i))[: K - C]
    rest = [i for i in range(N) if i not in dominant]
    targets = rest[:: len(rest) // C][:C] if C else []
    joined: dict[int, list[int]] = {t: [] for t in targets}
    for i in rest:
        if C and i not in targets:
            joined[first_best({t: cosine(mean_key(i), mean_key(t)) for t in targets})].append(i)
    weight = {i: {i: 1.0} for i in dominant}
    for t in targets:
        weight[t] = {t: 1.0, **{j: 1 / len(joined[t]) for j in joined[t]}}
    assert_both_keep("visionzip", K, sorted(weight), weight)


@pytest.mark.parametrize("K", [10, 14, 19])
def test_tome_in_one_round(K):
    a, b = range(1, N, 2), range(0, N, 2)
    into = {i: first_best({j: cosine(mean_key(i), mean_key(j)) for j in b}) for i in a}
    likeness = {i: cosine(mean_key(i), mean_key(into[i])) for i in a}
    going = sorted(a, key=lambda i: (-likeness[i], i))[: N - K]
    groups = {i: [i] for i in range(N) if i not in going}
    for i in going:
        groups[into[i]].append(i)
    weight = {i: {j: 1 / len(of) for j in of} for i, of in groups.items()}
    assert_both_keep("tome", K, sorted(groups), weight)


@pytest.mark.parametrize("K", [1, 2, 5, 12, 17])
def test_restore_as_published(K):
    """The selector keeps half of K by length; the others become means."""
    order = sorted(range(N), key=lambda i: (-math.dist(X[i], [0.0] * D), i))
    chosen = order[: max(1, K // 2)]
    rest = [i for i in range(N) if i not in chosen]
    density = {i: sum(cosine(X[i], X[j]) for j in rest) / len(rest) for i in rest}
    score = {}
    for i in rest:
        less_dense = [cosine(X[i], X[j]) for j in rest if density[j] < density[i] - 1e-12]
        score[i] = density[i] * (1 - max(less_dense, default=0.0))
    anchors = sorted(sorted(rest, key=lambda i: (-score[i], i))[: K - len(chosen)])
    members: dict[int, list[int]] = {i: [] for i in anchors}
    for i in rest if anchors else []:
        joined = i if i in members else first_best({j: cosine(X[i], X[j]) for j in anchors})
        members[joined].append(i)
    slots = {i: [i] for i in chosen} | {m[(len(m) - 1) // 2]: m for m in members.values()}
    weight = {i: dict.fromkeys(m, 1 / len(m)) for i, m in slots.items()}
    assert_both_keep("norm+restore:published", K, sorted(slots), weight)


def anchor_places() -> list[int]:
    """The place of each token by its cosine or by its sine, the better one."""
    by_cosine, by_sine = (
        sorted(range(N), key=lambda i: (-round(mean[i], 6), i)) for mean in (COSINE, SINE)
    )
    return [min(by_cosine.index(i), by_sine.index(i)) for i in range(N)]


@pytest.mark.parametrize(("K", "chosen"), [(1, 1), (3, 2), (8, 5), (15, 9), (19, 11)])
def test_anchors_join_what_a_selector_keeps(K, chosen):
    by_length = sorted(range(N), key=lambda i: (-math.dist(X[i], [0.0] * D), i))[:chosen]
    places = anchor_places()
    others = sorted((i for i in range(N) if i not in by_length), key=lambda i: (places[i], i))
    assert_both_keep("norm+ivc", K, sorted(by_length + others[: K - chosen]))


def value_shares(row: Vector) -> Vector:
    """Of one row a softmax of the products of its values with the tokens', mean over heads."""
    d, share = D // HEADS, [0.0] * N
    for h in range(HEADS):
        part = slice(h * d, h * d + d)
        logits = [
            sum(a * b for a, b in zip(row[part], value[part], strict=True)) / math.sqrt(d)
            for value in VALUES
        ]
        total = sum(math.exp(x) for x in logits)
        share = [a + math.exp(x) / total / HEADS for a, x in zip(share, logits, strict=True)]
    return share


@pytest.mark.parametrize("K", [2, 5, 10, 17])
def test_ivc_prune(K):
    """Two seeds of 20, a fifth of K anchors by either order, then what is like words and seeds."""
    by_words = [sum(share) for share in zip(*map(value_shares, TEXT_VALUES), strict=True)]
    seeds = sorted(range(N), key=lambda i: (-round(by_words[i], 12), i))[:2]
    rows = [value_shares(row) for row in [*TEXT_VALUES, *(VALUES[i] for i in seeds)]]
    like = [sum(share) / len(rows) for share in zip(*rows, strict=True)]
    anchors = [i for i, place in enumerate(anchor_places()) if place < round(0.2 * K)]
    order = sorted(
        range(N), key=lambda i: (i not in seeds, i not in anchors, -round(like[i], 12), i)
    )
    assert_both_keep("ivc_prune:seeds=0.1", K, sorted(order[:K]))


@pytest.mark.parametrize("K", [4, 9, 17])
def test_dart(K):
    def size(key: Vector) -> float:
        return sum(abs(k) for k in key)

    text_keys = ARRAYS["text_keys_BTD"][0].tolist()
    kept = sorted(range(N), key=lambda i: (-size(KEYS[i]), i))[:4]
    words = sorted(range(T), key=lambda t: (-size(text_keys[t]), t))[:4]
    pivots, rest = [X[i] for i in kept] + [TEXT[t] for t in words], K - 4
    for p, pivot in enumerate(pivots):
        share = (p + 1) * rest // len(pivots) - p * rest // len(pivots)
        left = [i for i in range(N) if i not in kept]
        kept = kept + sorted(left, key=lambda i: (cosine(X[i], pivot), i))[:share]
    assert_both_keep("dart", K, sorted(kept))


def test_fastv_scores_by_one_row_of_attention():
    """Four query heads share two key heads; the last token sees all 20 keys."""
    d, queries = D // HEADS, tokens(6, 1, 4, 2)
    share_N = [0.0] * N
    for head in range(4):
        query = [queries[head // 2][head % 2 * d + j] for j in range(d)]
        keys = [[KEYS[i][head // 2 * d + j] for j in range(d)] for i in range(N)]
        logits = [
            sum(q * k for q, k in zip(query, key, strict=True)) / math.sqrt(d) for key in keys
        ]
        total = sum(math.exp(x) for x in logits)
        share_N = [a + math.exp(x) / total / 4 for a, x in zip(share_N, logits, strict=True)]
    q = mx.array(np.array(queries, np.float32).reshape(1, 2, 2, 1, d))
    k = mx.array(heads(KEYS)).swapaxes(1, 2)
    row = attention(q, k, mx.ones((1, 1, N), dtype=mx.bool_), None)[:, 0]
    np.testing.assert_allclose(np.array(row)[0], share_N, rtol=1e-5)
    kept = resolve("fastv")(
        Signals(mx.array(ARRAYS["x_BND"]), (ROWS, COLUMNS), last_attention_BN=row), 7
    )
    row_N = np.array(row)[0].tolist()  # duplicated tokens tie only as float32 rounds them
    best = sorted(range(N), key=lambda i: (-row_N[i], i))[:7]
    assert np.array(kept.index_BK[0]).tolist() == sorted(best)
