"""Promises that every method of the table keeps; a new method is tested without new code.

Shapes: B images, N tokens, D features, K kept.
"""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given

from mlx_vlm_prune.pruners import Signals, resolve
from mlx_vlm_prune.pruners.grid import windows

from .pruner_cases import (
    INPUTS,
    VARIANTS,
    D,
    case,
    cases,
    float64_choices,
    make_pruner,
    many,
    select_images,
    signals,
)

SCORING = [
    "norm", "cls_attention", "received_attention", "patch_norm", "kq_norm", "divprune", "cdpruner",
    "scope", "mmtok", "fastv", "pyramiddrop", "v2drop", "twig", "visionzip:contextual=0",
    "dart:pivots=2",
]  # fmt: skip


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("spec", [*VARIANTS, "none"])
def test_keeping_all_is_the_identity_bit_for_bit(spec, kind):
    arrays = case(kind, 2, (3, 5), 0)
    kept = make_pruner(spec)(signals(arrays), 15)
    assert np.array(kept.tokens(mx.array(arrays["x_BND"]))).tobytes() == arrays["x_BND"].tobytes()


@pytest.mark.parametrize("spec", VARIANTS)
@many
@given(example=cases())
def test_an_image_does_not_depend_on_its_neighbours_in_the_batch(spec, example):
    arrays, K = example
    pruner = make_pruner(spec)
    with float64_choices():
        together = np.array(pruner(signals(arrays), K).index_BK)
        for b in range(len(arrays["x_BND"])):
            alone = pruner(signals(select_images(arrays, slice(b, b + 1))), K)
            np.testing.assert_array_equal(np.array(alone.index_BK[0]), together[b])


@pytest.mark.parametrize("spec", VARIANTS)
@many
@given(example=cases())
def test_k_distinct_tokens_in_range_are_kept_each_in_its_own_slot_and_merged_once(spec, example):
    arrays, K = example
    B, N, _ = arrays["x_BND"].shape
    kept = make_pruner(spec)(signals(arrays), K)
    index_BK, weight_BKN = np.array(kept.index_BK).astype(int), np.array(kept.mixture(N))
    assert index_BK.shape == (B, K)
    assert (np.diff(index_BK, axis=1) > 0).all()
    assert index_BK.min() >= 0 and index_BK.max() < N
    anchors = np.take_along_axis(weight_BKN, index_BK[..., None], axis=2)
    assert (weight_BKN >= 0).all()
    if spec.startswith("apet"):  # basis tokens, the first more than once, stand in other places
        np.testing.assert_allclose(weight_BKN.sum(-1), 1, rtol=1e-5)
    elif not spec.startswith("prumerge"):  # its slots add up neighbours, which may be shared
        assert (anchors > 0).all()
        # A token that fills up stays in the mean of its cluster too.
        most = 2 if spec == "similarity:published" else 1
        assert ((weight_BKN > 0).sum(axis=1) <= most).all()


@pytest.mark.parametrize("spec", ["avgpool", "similarity", "similarity:threshold=0.3", "tome"])
@many
@given(example=cases())
def test_a_merging_method_gives_every_token_to_exactly_one_mean(spec, example):
    arrays, K = example
    weight_BKN = np.array(make_pruner(spec)(signals(arrays), K).mixture(arrays["x_BND"].shape[1]))
    np.testing.assert_allclose(weight_BKN.sum(-1), 1, rtol=1e-5)
    assert ((weight_BKN > 0).sum(axis=1) == 1).all()


@pytest.mark.parametrize("spec", SCORING)
def test_a_scoring_method_follows_its_tokens_when_they_are_shuffled(spec):
    arrays = case("random", 1, (4, 6), 3)
    order = np.random.default_rng(5).permutation(24)
    shuffled = {
        k: v[..., order] if k.endswith("N") else v[:, order] if "_BN" in k else v
        for k, v in arrays.items()
    }
    kept = np.array(make_pruner(spec)(signals(arrays), 7).index_BK[0])
    moved = make_pruner(spec)(signals(shuffled), 7)
    assert sorted(order[np.array(moved.index_BK[0])]) == kept.tolist()


def test_windows_of_a_grid_worked_by_hand():
    # 4 x 4 in 4: four quarters; their upper left middle tokens are 0, 2, 8, 10.
    quarters = [w.ravel().tolist() for w in windows((4, 4), 4)]
    assert quarters == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    kept = resolve("uniform")(Signals(mx.zeros((1, 16, D)), (4, 4)), 4)
    assert np.array(kept.index_BK[0]).tolist() == [0, 2, 8, 10]
    # 2 x 5 in 3: one band of both rows, cut at columns 0, 1, 3 and 5.
    thirds = [w.ravel().tolist() for w in windows((2, 5), 3)]
    assert thirds == [[0, 5], [1, 2, 6, 7], [3, 4, 8, 9]]


def test_similarity_published_drops_the_bottom_of_an_image_and_the_fix_does_not():
    x = np.eye(8, dtype=np.float32)[None]  # nothing is alike
    tokens = Signals(mx.array(x), (4, 2))
    published = resolve("similarity:published")(tokens, 4)
    assert np.array(published.index_BK[0]).tolist() == [0, 1, 2, 3]
    assert np.array(published.mixture(8))[0, :, 4:].sum() == 0  # the lower half is gone
    complete = resolve("similarity")(tokens, 4)
    assert (np.array(complete.mixture(8))[0].sum(axis=0) > 0).all()
