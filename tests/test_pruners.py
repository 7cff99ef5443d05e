"""Promises that every method of the table keeps; a new method is tested without new code.

Shapes: B images, N tokens, D features, K kept.
"""

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torch_ref.pruners as ref
from convert.errors import UserError
from mlx_vlm_prune.pruners import METHODS, Pruner, Signals, resolve
from mlx_vlm_prune.pruners.attention_pool import AttentionPool
from mlx_vlm_prune.pruners.grid import windows

D = 8
CHOOSING = [name for name in METHODS if name not in ("none", "attention_pool")]
VARIANTS = [*CHOOSING, "similarity:published", "similarity:threshold=0.3", "random:seed=7"]
INPUTS = ("random", "flat", "duplicated", "near_duplicate", "zero", "one_hot", "extreme")


def features(kind: str, B: int, N: int, seed: int) -> np.ndarray:
    """Tokens (B, N, D) of one of the kinds that have broken published methods."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, N, D)).astype(np.float32)
    if kind == "flat":
        x[:] = x[:, :1]
    elif kind == "duplicated":
        x[:, N // 2 :] = x[:, : N - N // 2]
    elif kind == "near_duplicate":
        x = x[:, :1] + 1e-4 * x
    elif kind == "zero":
        x[:] = 0
    elif kind == "one_hot":
        x = np.eye(D, dtype=np.float32)[rng.integers(D, size=(B, N))]
    elif kind == "extreme":
        x = x * 1e4
    return x


def attention(kind: str, B: int, N: int, seed: int) -> np.ndarray:
    flat = kind in ("flat", "zero")
    scores = np.zeros((B, N)) if flat else np.random.default_rng(seed).normal(size=(B, N))
    share = np.exp(scores)
    return (share / share.sum(-1, keepdims=True)).astype(np.float32)


def signals(x_BND: np.ndarray, cls_BN: np.ndarray, grid: tuple[int, int]) -> Signals:
    return Signals(mx.array(x_BND), grid, cls_attention_BN=mx.array(cls_BN))


@st.composite
def cases(draw):
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    B, N = draw(st.integers(1, 3)), rows * columns
    K, seed = draw(st.integers(1, N)), draw(st.integers(0, 99))
    kind = draw(st.sampled_from(INPUTS))
    return features(kind, B, N, seed), attention(kind, B, N, seed), (rows, columns), K


many = settings(max_examples=60, deadline=None)


@pytest.mark.parametrize("spec", VARIANTS)
@many
@given(case=cases())
def test_k_tokens_are_kept_distinct_ascending_and_in_range(spec, case):
    x_BND, cls_BN, grid, K = case
    index_BK = np.array(resolve(spec)(signals(x_BND, cls_BN, grid), K).index_BK)
    assert index_BK.shape == (len(x_BND), K)
    assert (np.diff(index_BK.astype(int), axis=1) > 0).all()
    assert index_BK.min() >= 0 and index_BK.max() < x_BND.shape[1]


@pytest.mark.parametrize("spec", VARIANTS)
@many
@given(case=cases())
def test_both_frameworks_keep_the_same_tokens_and_mix_them_alike(spec, case):
    x_BND, cls_BN, grid, K = case
    pruner = resolve(spec)
    ours = pruner(signals(x_BND, cls_BN, grid), K)
    theirs = twin(pruner, x_BND, cls_BN, grid, K)
    np.testing.assert_array_equal(np.array(ours.index_BK), theirs.index_BK.numpy())
    kept = theirs.tokens(torch.from_numpy(x_BND)).numpy()
    close(np.array(ours.tokens(mx.array(x_BND))), kept)


def twin(pruner: Pruner, x_BND, cls_BN, grid, K):
    seen = ref.Signals(torch.from_numpy(x_BND), grid, cls_attention_BN=torch.from_numpy(cls_BN))
    options = {k: v for k, v in pruner.options.items() if k != "layer"}
    return ref.reduce(pruner.name, seen, K, **options)


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """float32 parity: rtol 1e-4, atol 1e-5 of the largest value."""
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max() + 1e-12)


@pytest.mark.parametrize("spec", [*VARIANTS, "none"])
@many
@given(case=cases())
def test_keeping_all_is_the_identity_bit_for_bit(spec, case):
    x_BND, cls_BN, grid, _ = case
    kept = resolve(spec)(signals(x_BND, cls_BN, grid), x_BND.shape[1])
    assert np.array(kept.tokens(mx.array(x_BND))).tobytes() == x_BND.tobytes()


@pytest.mark.parametrize("spec", VARIANTS)
@many
@given(case=cases())
def test_an_image_does_not_depend_on_its_neighbours_in_the_batch(spec, case):
    x_BND, cls_BN, grid, K = case
    pruner = resolve(spec)
    together = pruner(signals(x_BND, cls_BN, grid), K)
    for b in range(len(x_BND)):
        alone = pruner(signals(x_BND[b : b + 1], cls_BN[b : b + 1], grid), K)
        np.testing.assert_array_equal(np.array(alone.index_BK[0]), np.array(together.index_BK[b]))


@pytest.mark.parametrize("spec", ["avgpool", "similarity", "similarity:threshold=0.3"])
@many
@given(case=cases())
def test_a_merging_method_gives_every_token_to_exactly_one_slot(spec, case):
    x_BND, cls_BN, grid, K = case
    kept = resolve(spec)(signals(x_BND, cls_BN, grid), K)
    if kept.weight_BKN is None:  # K = N
        return
    weight_BKN = np.array(kept.weight_BKN)
    np.testing.assert_allclose(weight_BKN.sum(-1), 1, rtol=1e-5)
    assert ((weight_BKN > 0).sum(axis=1) == 1).all()
    anchors = np.take_along_axis(weight_BKN, np.array(kept.index_BK)[..., None].astype(int), axis=2)
    assert (anchors > 0).all()


@pytest.mark.parametrize("spec", ["norm", "cls_attention"])
def test_a_scoring_method_follows_its_tokens_when_they_are_shuffled(spec):
    x_BND, cls_BN = features("random", 1, 24, 3), attention("random", 1, 24, 3)
    order = np.random.default_rng(5).permutation(24)
    kept = np.array(resolve(spec)(signals(x_BND, cls_BN, (4, 6)), 7).index_BK[0])
    moved = resolve(spec)(signals(x_BND[:, order], cls_BN[:, order], (4, 6)), 7)
    assert sorted(order[np.array(moved.index_BK[0])]) == kept.tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("spec", VARIANTS)
def test_half_precision_keeps_k_tokens_and_its_dtype(spec, dtype):
    x_BND, cls_BN = features("random", 2, 30, 1), attention("random", 2, 30, 1)
    half = mx.array(x_BND).astype(getattr(mx, dtype))
    seen = Signals(half, (5, 6), cls_attention_BN=mx.array(cls_BN))
    kept = resolve(spec)(seen, 11)
    assert len(set(np.array(kept.index_BK[0]).tolist())) == 11
    assert kept.tokens(half).dtype == half.dtype


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("K", [20, 98, 150])
def test_similarity_agrees_at_full_width_on_near_duplicates_too(noise, K):
    rng = np.random.default_rng(K)
    kinds_8D = rng.normal(size=(8, 768))
    x_BND = kinds_8D[rng.integers(8, size=(1, 196))] + noise * rng.normal(size=(1, 196, 768))
    x_BND, cls_BN = x_BND.astype(np.float32), np.zeros((1, 196), np.float32)
    ours = resolve("similarity")(signals(x_BND, cls_BN, (14, 14)), K)
    theirs = twin(resolve("similarity"), x_BND, cls_BN, (14, 14), K)
    np.testing.assert_array_equal(np.array(ours.index_BK), theirs.index_BK.numpy())
    np.testing.assert_array_equal(np.array(ours.weight_BKN), theirs.weight_BKN.numpy())


def test_the_check_between_frameworks_can_fail():
    """A twin that keeps the smallest norms instead of the largest must not pass."""
    x_BND, cls_BN = features("random", 1, 16, 0), attention("random", 1, 16, 0)
    ours = resolve("norm")(signals(x_BND, cls_BN, (4, 4)), 5)
    score_BN = torch.from_numpy(x_BND).norm(dim=-1)
    broken = score_BN.argsort(dim=-1, stable=True)[:, :5].sort(dim=-1).values
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(np.array(ours.index_BK), broken.numpy())


def test_attention_pool_is_the_softmax_of_its_queries_in_both_frameworks():
    rng, N, K = np.random.default_rng(2), 20, 6
    x_BND = rng.normal(size=(2, N, D)).astype(np.float32)
    weights = {"pool_queries": rng.normal(size=(K, D))}
    for name in "qkv":
        weights[f"pool_{name}_proj.weight"] = rng.normal(size=(D, D))
        weights[f"pool_{name}_proj.bias"] = rng.normal(size=D)
    weights = {k: v.astype(np.float32) for k, v in weights.items()}
    pool = AttentionPool(K, D)
    pool.load_weights([(k.removeprefix("pool_"), mx.array(v)) for k, v in weights.items()])
    kept = resolve("attention_pool", ("attention_pool", pool))(Signals(mx.array(x_BND), (4, 5)), K)

    def linear(x, name):
        return x @ weights[f"pool_{name}_proj.weight"].T + weights[f"pool_{name}_proj.bias"]

    logits_BKN = linear(weights["pool_queries"], "q") @ linear(x_BND, "k").swapaxes(1, 2) / D**0.5
    share_BKN = np.exp(logits_BKN - logits_BKN.max(-1, keepdims=True))
    share_BKN /= share_BKN.sum(-1, keepdims=True)
    close(np.array(kept.tokens(mx.array(x_BND))), share_BKN @ linear(x_BND, "v"))
    theirs = ref.attention_pool.AttentionPool(K, D)
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    with torch.no_grad():
        twin_kept = theirs.prune(ref.Signals(torch.from_numpy(x_BND), (4, 5)), K)
        close(
            np.array(kept.tokens(mx.array(x_BND))),
            twin_kept.tokens(torch.from_numpy(x_BND)).numpy(),
        )


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
    seen = Signals(mx.array(x), (4, 2))
    published = resolve("similarity:published")(seen, 4)
    assert np.array(published.index_BK[0]).tolist() == [0, 1, 2, 3]
    assert np.array(published.weight_BKN)[0, :, 4:].sum() == 0  # the lower half is gone
    fixed = resolve("similarity")(seen, 4)
    assert (np.array(fixed.weight_BKN)[0].sum(axis=0) > 0).all()


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("avgpol", "did you mean avgpool"),
        ("random:sed=3", "did you mean seed"),
        ("random:seed=x", "takes an int"),
        ("similarity:published=maybe", "takes a bool"),
        ("norm:p=1", "it has none"),
        ("attention_pool", "holds no weights"),
    ],
)
def test_a_wrong_pruner_or_option_is_named_with_what_there_is(spec, part):
    with pytest.raises(UserError, match=part):
        resolve(spec)


@pytest.mark.parametrize("K", [0, 17])
def test_a_budget_outside_one_to_n_is_refused(K):
    with pytest.raises(UserError, match="keep 1 to 16"):
        resolve("norm")(Signals(mx.zeros((1, 16, D)), (4, 4)), K)


def test_features_that_are_not_numbers_are_refused():
    x = mx.full((1, 16, D), mx.nan)
    with pytest.raises(UserError, match="NaN"):
        resolve("norm")(Signals(x, (4, 4)), 4)
