"""The parity contract's second line: float32, in which a GPU chooses, keeps the tokens that float64
keeps but for ones whose score lies within 1e-5 of the last kept one's.

Scores are float64's. A greedy method is followed step by step: of what float32 kept, the best token
of a step may be worse than the best of all by 1e-5. Methods of rounds and clusters have no one
score: they keep the same, but where all similarities lie within 1e-5.

Shapes: B images, N tokens, K kept, M rows to cover.
"""

import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune.pruners import METHODS, Pruner, Reduction, Signals, numerics, window_merge
from mlx_vlm_prune.pruners.cdpruner import relevance
from mlx_vlm_prune.pruners.numerics import cosine, keep_highest, precision

from .pruner_cases import (
    LEARNED,
    VARIANTS,
    case,
    float64_choices,
    learned_pair,
    make_pruner,
    signals,
)

NEAR = 1e-5
KINDS = (
    "random", "clustered", "tightly clustered", "near_duplicate", "flat", "duplicated", "one_hot",
    "extreme",
)  # fmt: skip
BUDGETS = (1, 7, 16, 40)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
HALVED = ("random", "near_duplicate", "duplicated", "extreme")  # asked in half precision, too


def tokens_of(kind: str, dtype: mx.Dtype, seed: int) -> Signals:
    """Two images of 64 tokens; attention and the projector's answers stay float32."""
    both = signals(case(kind, 2, (8, 8), seed))
    halved = {
        name: array.astype(dtype)
        for name, array in both.arrays.items()
        if array.dtype == mx.float32 and "attention" not in name and name != "sensitivity_BN"
    }
    return both.replace(**halved)


def kept_in(name: str, pruner: Pruner, tokens: Signals, K: int) -> np.ndarray:
    with float64_choices() if name == "float64" else precision(name):
        kept: Reduction = pruner(tokens, K)
        mx.eval(kept.arrays)
    assert kept.index_BK.shape == (2, K) and bool(kept.is_finite)
    return np.array(kept.index_BK)


def assert_near(score_N: np.ndarray, kept: set[int], theirs: set[int]) -> None:
    """Tokens kept in one dtype alone have scores within 1e-5 of the last kept one's."""
    last = min(score_N[list(kept)])
    swapped = score_N[list(kept ^ theirs)]
    assert (np.abs(swapped - last) <= NEAR * max(1, abs(last))).all()


def scores_of(pruner: Pruner, tokens: Signals, K: int, monkeypatch) -> np.ndarray:
    """The float64 scores (B, N) of which a method last kept the highest."""
    seen = []

    def recording(score_BN: mx.array, K: int) -> mx.array:
        seen.append(score_BN)
        return keep_highest(score_BN, K)

    function = pruner.method.prune or pruner.weights.prune
    monkeypatch.setattr(sys.modules[function.__module__], "keep_highest", recording)
    kept_in("float64", pruner, tokens, K)
    monkeypatch.undo()
    return np.array(seen[-1])


def greedily_good(gain, kept: set[int], N: int) -> None:
    """Follow a greedy choice through the kept tokens: `gain(done)` are the float64 scores (N,)
    after the tokens `done`."""
    done: list[int] = []
    while len(done) < len(kept):
        score_N = gain(done)
        left = sorted(kept - set(done))
        best = left[int(np.argmax(score_N[left]))]
        others = [i for i in range(N) if i not in done]
        assert score_N[best] >= score_N[others].max() - NEAR, (len(done), best)
        done.append(best)


def distance_gains(tokens: Signals, b: int, options: dict):
    apart_NN = 1 - np.array(cosine(tokens.x_BND))[b]

    def gain(done: list[int]) -> np.ndarray:
        if done:
            return apart_NN[done].min(axis=0)
        return (apart_NN + np.diag(np.full(len(apart_NN), np.inf))).min(axis=0)

    return gain


def variance_gains(tokens: Signals, b: int, options: dict):
    """Conditional variances, where they are exhausted the relevance below them all."""
    relevance_N = np.array(relevance(tokens, options.get("negative", False)))[b]
    kernel_NN = relevance_N[:, None] * np.array(cosine(tokens.x_BND))[b] * relevance_N

    def gain(done: list[int]) -> np.ndarray:
        explained_N = 0.0
        if done:
            inverse = np.linalg.pinv(kernel_NN[np.ix_(done, done)], rcond=NEAR, hermitian=True)
            explained_N = np.einsum("kn,kj,jn->n", kernel_NN[done], inverse, kernel_NN[done])
        variance_N = np.diagonal(kernel_NN) - explained_N
        return np.where(variance_N > NEAR, variance_N, NEAR * relevance_N)

    return gain


def cover_gains(rows_MN: np.ndarray, salient_N: np.ndarray):
    def gain(done: list[int]) -> np.ndarray:
        covered_M1 = np.maximum(rows_MN[:, done].max(axis=1, initial=0), 0)[:, None]
        return np.maximum(rows_MN - covered_M1, 0).sum(axis=0) * salient_N

    return gain


def scope_gains(tokens: Signals, b: int, options: dict):
    salient_N = np.array(tokens.cls_attention_BN[b]).astype(np.float64) ** options.get("power", 1)
    return cover_gains(np.array(cosine(tokens.x_BND))[b], salient_N)


def supported_gains(tokens: Signals, b: int, options: dict):
    apart_NN = 1 - np.array(cosine(tokens.x_BND))[b]
    power = options.get("power", 0.8)
    support_N = np.array(tokens.received_attention_BN[b]).astype(np.float64) ** power

    def gain(done: list[int]) -> np.ndarray:
        return support_N * (apart_NN[done].min(axis=0).clip(0) if done else 1)

    return gain


def sensitivity_gains(tokens: Signals, b: int, options: dict):
    apart_NN = 1 - np.array(cosine(tokens.x_BND))[b]
    moved_N = np.array(tokens.sensitivity_BN[b]).astype(np.float64)
    spread = np.ptp(moved_N)
    weight_N = (moved_N - moved_N.min()) / spread if spread > 1e-3 * moved_N.max() else 1.0

    def gain(done: list[int]) -> np.ndarray:
        return weight_N * (apart_NN[done].min(axis=0).clip(0) if done else np.ones(len(apart_NN)))

    return gain


def assert_alike_windows(pruner: Pruner, tokens: Signals, K: int, b: int, swapped: set[int]):
    """Windows that merge in one dtype alone are alike to within 1e-5."""
    side = window_merge.window_side(tokens.grid, K, pruner.options.get("side", 3))
    window_N, _, _, count_W = map(mx.array, window_merge.windows(tokens.grid, side))
    with float64_choices():
        like_W = np.array(window_merge.likeness(numerics.unit(tokens.x_BND), window_N, count_W))[b]
    likes = like_W[np.array(window_N)[sorted(swapped)]]
    assert likes.max() - likes.min() <= NEAR


def mmtok_gains(tokens: Signals, b: int, options: dict):
    def softmax(logits: np.ndarray) -> np.ndarray:
        power = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return power / power.sum(axis=-1, keepdims=True)

    words = np.array(cosine(tokens.text_BTD, tokens.x_BND))[b][np.array(tokens.text_real_BT[b])]
    among = np.array(cosine(tokens.features_BND))[b]
    rows = [softmax(words / 0.02) / len(words)]
    rows.append(softmax(among / 0.2) * options.get("image", 0.5) / len(among))
    return cover_gains(np.concatenate(rows), np.ones(len(among)))


def kept_by_rounding_more(pruner: Pruner, tokens: Signals, K: int, monkeypatch) -> np.ndarray:
    """What float64 keeps where it rounds all similarities and scores as float32 does: by less than
    1e-5 of theirs."""
    real = {name: getattr(numerics, name) for name in ("unit", "rounded", "rounded_cosine")}

    def in_float32(name: str):
        def replacement(x: mx.array, *digits: int) -> mx.array:
            with precision("float32"):
                near = real[name](x, *digits)
            return near if name == "unit" else near.astype(mx.float64)

        return replacement

    for module in list(sys.modules.values()):
        for name, function in real.items():
            if vars(module).get(name) is function:
                monkeypatch.setattr(module, name, in_float32(name))
    kept_BK = kept_in("float64", pruner, tokens, K)
    monkeypatch.undo()
    return kept_BK


ROUNDING = {
    "tome", "similarity", "vispruner", "dart", "pact", "sparsevlm", "holov", "two_scales",
    "lookahead", "learn_prune", "ivc_prune", "flashvid",
}  # fmt: skip
GREEDY = {
    "divprune": distance_gains, "cdpruner": variance_gains, "scope": scope_gains,
    "mmtok": mmtok_gains, "salience_coverage": supported_gains, "zoo_prune": sensitivity_gains,
}  # fmt: skip


def assert_parity(spec: str, pruner: Pruner, tokens: Signals, K: int, monkeypatch) -> bool:
    """The contract, for every image; are the kept sets equal?"""
    exact_BK, near_BK = (kept_in(name, pruner, tokens, K) for name in ("float64", "float32"))
    if (exact_BK == near_BK).all():
        return True
    for b, (exact_K, near_K) in enumerate(zip(exact_BK, near_BK, strict=True)):
        if pruner.enhancer or pruner.name in ROUNDING:
            rounded_BK = kept_by_rounding_more(pruner, tokens, K, monkeypatch)
            if pruner.name == "ivc_prune" and (near_BK != rounded_BK).any():
                # Of the same seeds: what follows them has one score.
                score_N = scores_of(pruner, tokens, K, monkeypatch)[b]
                assert_near(score_N, set(exact_K.tolist()), set(near_K.tolist()))
                continue
            np.testing.assert_array_equal(near_BK, rounded_BK)
        elif pruner.name == "window_merge":
            swapped = set(exact_K.tolist()) ^ set(near_K.tolist())
            if swapped:
                assert_alike_windows(pruner, tokens, K, b, swapped)
        elif pruner.name in GREEDY:
            with float64_choices():
                gain = GREEDY[pruner.name](tokens, b, pruner.options)
            greedily_good(gain, set(near_K.tolist()), 64)
        else:
            score_N = scores_of(pruner, tokens, K, monkeypatch)[b]
            assert_near(score_N, set(exact_K.tolist()), set(near_K.tolist()))
    return False


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [*VARIANTS, *sorted(set(LEARNED) - {"attention_pool"})])
def test_float32_keeps_what_float64_keeps_but_for_near_ties(spec, kind, monkeypatch):
    if spec in LEARNED:
        pruner = Pruner(spec, METHODS[spec], weights=learned_pair(spec, 7)[0])
    else:
        pruner = make_pruner(spec)
    for dtype in DTYPES if kind in HALVED else (mx.float32,):
        if kind == "extreme" and dtype == mx.float16:
            continue  # beyond its range
        for K in BUDGETS:
            assert_parity(spec, pruner, tokens_of(kind, dtype, 3), K, monkeypatch)


@pytest.mark.parametrize("kind", ["flat", "zero"])
@pytest.mark.parametrize("spec", VARIANTS)
def test_of_equal_tokens_float32_keeps_the_lower_index_as_float64_does(spec, kind):
    tokens = tokens_of(kind, mx.float32, 3)
    for K in BUDGETS:
        exact_BK, near_BK = (
            kept_in(n, make_pruner(spec), tokens, K) for n in ("float64", "float32")
        )
        np.testing.assert_array_equal(near_BK, exact_BK)


@pytest.mark.parametrize("spec", ["divprune", "cdpruner", "scope", "mmtok", "tome", "vispruner"])
def test_similarities_in_tf32s_ten_bits_would_be_seen(spec, monkeypatch):
    unit = numerics.unit

    def coarse(x_BND: mx.array) -> mx.array:
        x_BND = unit(x_BND)
        return x_BND if x_BND.dtype == mx.float64 else x_BND.astype(mx.float16).astype(mx.float32)

    for module in list(sys.modules.values()):
        if vars(module).get("unit") is unit:
            monkeypatch.setattr(module, "unit", coarse)
    with pytest.raises(AssertionError):
        for K in BUDGETS:
            for kind in ("tightly clustered", "clustered", "random"):
                assert_parity(
                    spec, make_pruner(spec), tokens_of(kind, mx.float32, 3), K, monkeypatch
                )
