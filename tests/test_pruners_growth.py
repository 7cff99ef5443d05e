"""What is worked out lazily or in blocks is the same as what is worked out in full.

Shapes: B images, M rows, N tokens, D features, K kept.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune.pruners import Reduction, cdpruner, clusters, flashvid, lazy, resolve, rows
from mlx_vlm_prune.pruners.coverage import cover, cover_lazily
from mlx_vlm_prune.pruners.lazy import HeldRows, highest
from mlx_vlm_prune.pruners.numerics import choosing, precision
from mlx_vlm_prune.pruners.rows import Rows, cosine_rows
from mlx_vlm_prune.pruners.vispruner import thin_out, thin_out_on_host

from .pruner_cases import CHOOSING, INPUTS, case, make_pruner, signals

pytestmark = pytest.mark.usefixtures("on_the_cpu_in_float64")
CASES = 1000
BY_ROWS = [
    "divprune", "cdpruner", "scope", "scope:power=0", "mmtok", "vispruner", "visionzip", "prumerge",
    "prumerge:neighbours=2", "prumerge_plus", "apet", "tome", "global_local",
    "flashvid",
]  # fmt: skip


def integers_with_ties(rng: np.random.Generator, *shape: int) -> mx.array:
    """Few different values, so that many sums are equal."""
    return mx.array(rng.integers(-1, rng.integers(1, 4), size=shape).astype(np.float32))


def in_float64(x_BNM: mx.array) -> mx.array:
    return x_BNM.astype(mx.float64)


def test_lazy_gains_choose_what_all_gains_choose_ties_included(monkeypatch):
    with choosing():
        for seed in range(CASES):
            monkeypatch.setattr(lazy, "BATCH", 1 + seed % 16)  # few, so that bounds decide
            rng = np.random.default_rng(seed)
            B, N, M = (int(n) for n in rng.integers(1, (4, 24, 24)))
            x_BNM = integers_with_ties(rng, B, N, M)
            salient_BN = mx.array(rng.integers(0, 3, size=(B, N)).astype(np.float32))
            salient_BN, K = salient_BN.astype(mx.float64), int(rng.integers(1, N + 1))
            full_BK = cover(Rows(in_float64, x_BNM), salient_BN, K)
            for b in range(B):
                rows_of_image = HeldRows(Rows(in_float64, x_BNM[b : b + 1], hold=False))
                lazy_K = cover_lazily(rows_of_image, np.array(salient_BN[b]), K)
                assert lazy_K == full_BK[b].tolist(), seed


def test_rounds_on_the_host_drop_what_one_graph_drops_ties_included(monkeypatch):
    monkeypatch.setattr("mlx_vlm_prune.pruners.vispruner.LISTED", 3)
    with choosing():
        for seed in range(CASES):
            rng = np.random.default_rng(seed)
            B, N, D = (int(n) for n in rng.integers((1, 2, 1), (4, 40, 4)))
            x_BND = integers_with_ties(rng, B, N, D)
            R = int(rng.integers(1, N + 1))
            order_BR = mx.array(np.stack([rng.permutation(N)[:R] for _ in range(B)]))
            least = int(rng.integers(1, R + 1))
            full_BR = thin_out(cosine_rows(x_BND), order_BR, least)
            for b in range(B):
                similar = cosine_rows(x_BND[b : b + 1], hold=False)
                host_R = thin_out_on_host(similar, np.array(order_BR[b]), least)
                assert host_R.tolist() == full_BR[b].tolist(), seed


def test_few_held_rows_are_the_rows_whatever_is_read_and_changed(monkeypatch):
    monkeypatch.setattr(lazy, "MOST_BYTES", 0)
    monkeypatch.setattr(lazy, "AHEAD", 5)
    with choosing():
        for seed in range(50):
            rng = np.random.default_rng(seed)
            N, M = (int(n) for n in rng.integers(1, (150, 9)))
            x_NM = rng.normal(size=(N, M)).astype(np.float32)
            held = HeldRows(Rows(in_float64, mx.array(x_NM[None]), hold=False))
            sums_1N = held.summed_up(lambda row_BnM: row_BnM.sum(axis=-1))
            np.testing.assert_allclose(np.array(sums_1N)[0], x_NM.sum(axis=-1), atol=1e-5)
            held.then(lambda row_BnM: 2 * row_BnM)
            for _ in range(60):
                index_n, likely_n = (rng.permutation(N)[: rng.integers(1, k)] for k in (17, 6))
                row_nM = held.take(index_n, lambda likely_n=likely_n: likely_n)
                np.testing.assert_array_equal(row_nM, 2 * x_NM[index_n])
            assert len(held.held_hM) == min(N, 37)


@pytest.mark.parametrize("values", [[3, 1, 3, 2, 3], [0, 0, 0, 0], [1], [-np.inf, 2, -np.inf]])
def test_the_highest_come_first_and_of_equals_the_lower_index(values):
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    for k in range(1, len(values) + 1):
        assert highest(np.array(values, float), k).tolist() == order[:k]


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("spec", BY_ROWS)
def test_blocks_keep_and_mix_what_the_whole_matrix_does_bit_for_bit(spec, kind, monkeypatch):
    arrays, pruner = case(kind, 2, (6, 7), 4), make_pruner(spec)
    with precision("float64"):
        whole = pruner(signals(arrays), 13)
        monkeypatch.setattr(rows, "MOST_HELD", 0)
        monkeypatch.setattr(rows, "BLOCK", 5)
        monkeypatch.setattr(lazy, "MOST_BYTES", 0)
        monkeypatch.setattr(lazy, "AHEAD", 5)
        in_blocks = pruner(signals(arrays), 13)
        assert in_blocks.index_BK.tolist() == whole.index_BK.tolist()
        mixtures = [np.array(kept.mixture(42)) for kept in (in_blocks, whole)]
        assert mixtures[0].tobytes() == mixtures[1].tobytes()


PARTS = [
    ("cdpruner", "float64", cdpruner, "MOST_ROWS", 4),
    ("cdpruner", "float32", cdpruner, "MOST_ON_GPU", 4),
    ("sparsevlm:recycle=0.9", "float64", clusters, "TILE", 3),
    ("sparsevlm:recycle=0.9", "float32", clusters, "BLOCK", 50),
    ("flashvid", "float64", clusters, "TILE", 3),
    ("flashvid", "float32", clusters, "BLOCK", 50),
    ("flashvid", "float64", flashvid, "MOST_HELD", 1),
    ("pact", "float64", rows, "BLOCK", 3),
    *((spec, "float32", rows, "MOST_HELD", 0) for spec in BY_ROWS),
]


@pytest.mark.parametrize(("spec", "dtype", "module", "limit", "size"), PARTS)
def test_small_parts_keep_what_one_does(spec, dtype, module, limit, size, monkeypatch):
    tokens, pruner = signals(case("random", 2, (6, 7), 4)), make_pruner(spec)
    monkeypatch.setattr(rows, "BLOCK", 5)
    with precision(dtype):
        for K in (1, 13, 41):
            whole = pruner(tokens, K)
            with monkeypatch.context() as patch:
                patch.setattr(module, limit, size)
                in_parts = pruner(tokens, K)
                assert in_parts.index_BK.tolist() == whole.index_BK.tolist()
                mixtures = [np.array(kept.mixture(42)) for kept in (in_parts, whole)]
                np.testing.assert_allclose(*mixtures, atol=1e-5)


@pytest.mark.parametrize("spec", sorted({*CHOOSING} - {"twig"}))
def test_no_array_of_all_pairs_is_made_above_the_limit(spec, monkeypatch):
    """The peak while 1,600 tokens are chosen from, 20 MB for all pairs, is far below that."""
    monkeypatch.setattr(rows, "MOST_HELD", 0)
    monkeypatch.setattr(rows, "BLOCK", 16)
    monkeypatch.setattr(lazy, "MOST_BYTES", 0)
    tokens = signals(case("random", 1, (40, 40), 0))
    mx.eval(list(tokens.arrays.values()))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(resolve(spec)(tokens, 40).arrays)
    assert mx.get_peak_memory() - before < 12e6


def random_merge(rng: np.random.Generator, B: int, N: int, K: int) -> Reduction:
    """K slots, each with its token, and of the other tokens some in a slot and some dropped."""
    index_BK = np.stack([np.sort(rng.permutation(N)[:K]) for _ in range(B)])
    slot_BN = rng.integers(-1, K, size=(B, N))
    np.put_along_axis(slot_BN, index_BK, np.arange(K)[None], axis=1)
    return Reduction.merge(mx.array(index_BK), mx.array(slot_BN))


def dense(kept: Reduction, N: int) -> Reduction:
    return Reduction(kept.index_BK, kept.mixture(N))


@pytest.mark.parametrize("seed", range(20))
def test_slots_and_shares_reduce_and_chain_like_their_weights(seed):
    rng = np.random.default_rng(seed)
    B, N, n, K = 2, 15, 9, 4
    merges = [random_merge(rng, B, N, n), random_merge(rng, B, n, K)]
    kept = Reduction(mx.array(np.stack([np.sort(rng.permutation(N)[:n]) for _ in range(B)])))
    x_BND = mx.array(rng.normal(size=(B, N, 3)).astype(np.float32))
    size_BN = mx.array(rng.integers(1, 5, size=(B, N)).astype(np.float32))
    for first in (merges[0], kept):
        whole = merges[1].after(first, N)
        weights = dense(merges[1], n).after(dense(first, N), N)
        assert whole.slot_BN is not None and weights.slot_BN is None
        for ours, theirs in (
            (whole.mixture(N), weights.mixture(N)),
            (whole.apply(x_BND), weights.apply(x_BND)),
            (whole.sizes(size_BN), weights.sizes(size_BN)),
        ):
            np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-5, atol=1e-6)
