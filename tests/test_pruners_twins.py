"""Both frameworks choose alike, and the check that says so fails for a broken twin.

Shapes: B images, N tokens, D features, K kept.
"""

import inspect
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given

import torch_ref.pruners as ref
from mlx_vlm_prune import pruners
from mlx_vlm_prune.pruners import METHODS, Signals, resolve
from mlx_vlm_prune.pruners.attention_pool import AttentionPool
from torch_ref.pruners.spec import positions

from .pruner_cases import (
    LEARNED,
    VARIANTS,
    D,
    assert_agreement,
    case,
    cases,
    close,
    completed_reduction,
    learned_pair,
    make_pruner,
    many,
    reference_reduction,
    reference_signals,
    signals,
)

pytestmark = pytest.mark.usefixtures("on_the_cpu_in_float64")


@pytest.mark.parametrize("spec", VARIANTS)
@many
@given(example=cases())
def test_both_frameworks_keep_the_same_tokens_and_mix_them_alike(spec, example):
    assert_agreement(spec, *example)


@pytest.mark.parametrize("seed", [39, 188, 194, 238, 258])
def test_gains_that_differ_by_less_than_their_rounding_tie_in_both_frameworks(seed):
    """Two near duplicates cover each other: of gains of 9e-9 some are 4e-18 apart."""
    assert_agreement("mmtok", case("near_duplicate", 1, (9, 9), seed), 40)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("spec", VARIANTS)
def test_half_precision_keeps_the_same_k_tokens_and_its_dtype(spec, dtype):
    """Choices are made in float64, so what both frameworks read in half they choose alike."""
    arrays, pruner = case("random", 2, (5, 6), 1), make_pruner(spec)
    half = {k for k, v in arrays.items() if np.ndim(v) > 2}
    mx_arrays = {k: v if k == "grid" else mx.array(v) for k, v in arrays.items()}
    mx_arrays |= {k: mx_arrays[k].astype(getattr(mx, dtype)) for k in half}
    kept = pruner(Signals(**mx_arrays), 11)
    assert kept.tokens(mx_arrays["x_BND"]).dtype == mx_arrays["x_BND"].dtype
    torch_arrays = {k: v if k == "grid" else torch.from_numpy(v) for k, v in arrays.items()}
    torch_arrays |= {k: torch_arrays[k].to(getattr(torch, dtype)) for k in half}
    theirs = completed_reduction(pruner, ref.Signals(**torch_arrays), 11)
    np.testing.assert_array_equal(np.array(kept.index_BK), theirs.index_BK.numpy())
    assert len(set(np.array(kept.index_BK[0]).tolist())) == 11


def test_every_method_has_its_twin_and_every_module_its_line():
    assert set(ref.METHODS) == set(METHODS)
    for name, method in METHODS.items():
        theirs = ref.METHODS[name]
        assert ref.STAGES[method.stage.name.lower()][name] is theirs
        functions = "prune cuts leaves give_back schedule attention_bias probe"
        for function in functions.split():
            there = hasattr(theirs, function)
            assert (getattr(method, function) is not None) == there, (name, function)
        needs = {signal: option for signal, option in method.needs.items() if signal != "grid"}
        assert needs == ref.entry(theirs, "needs")
        assert method.learned == ref.is_learned(name)
        assert method.proportional == ref.entry(theirs, "proportional")
        assert method.positions == positions([ref.Step(name)])
        given = {}
        for function in (theirs.prune if method.prune else None, getattr(theirs, "probe", None)):
            given |= inspect.signature(function).parameters if function else {}
        for key, parameter in given.items():
            if parameter.default is not parameter.empty:
                assert method.options[key] == parameter.default, (name, key)
    helpers = """
        contract numerics grid rows lazy coverage budget clusters method pipeline scorer spec trace
        listing observed own_methods shares image_budgets reduction_check
    """
    modules = {file.stem for file in Path(pruners.__file__).parent.glob("[a-z]*.py")}
    assert modules == set(METHODS) | set(helpers.split())


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("K", [20, 98, 150])
def test_similarity_agrees_at_full_width_on_near_duplicates_too(noise, K):
    rng = np.random.default_rng(K)
    kinds_8D = rng.normal(size=(8, 768))
    x_BND = kinds_8D[rng.integers(8, size=(1, 196))] + noise * rng.normal(size=(1, 196, 768))
    arrays = {"x_BND": x_BND.astype(np.float32), "grid": (14, 14)}
    pruner = resolve("similarity")
    ours, theirs = pruner(signals(arrays), K), reference_reduction(pruner, arrays, K)
    np.testing.assert_array_equal(np.array(ours.index_BK), theirs.index_BK.numpy())
    np.testing.assert_array_equal(np.array(ours.mixture(196)), theirs.weight_BKN.numpy())


BROKEN = {  # of every family a method, and what is done to a helper of its twin
    "uniform": ("centre", lambda window, columns: window[1] * columns - columns + window[3] - 1),
    "avgpool": ("members", lambda window, columns: [window[0] * columns + window[2]]),
    "norm": ("keep_highest", lambda score, K: ref.numerics.keep_highest(-score, K)),
    "similarity": ("exactly_k", lambda of, alike, K: ref.similarity.first_k(of, K, len(alike))),
    "visionzip": ("cosine", lambda x: -ref.numerics.cosine(x)),
    "vispruner": ("cosine", lambda x: -ref.numerics.cosine(x)),
    "prumerge": ("highest", lambda score, K: ref.numerics.highest(-score, K)),
    "hiprune": ("highest", lambda score, K: ref.numerics.highest(-score, K)),
    "holov": ("highest", lambda score, K: ref.numerics.highest(-score, K)),
    "tome": ("cosine", lambda x, y: -ref.numerics.cosine(x, y)),
    "pixelprune": ("prediction_errors", lambda patch, grid, tolerance: patch.abs().sum(dim=1)),
    "divprune": ("cosine", lambda x: -ref.numerics.cosine(x)),
    "prunesid": ("strongest_component", lambda x, count: [i % count for i in range(len(x))]),
    "zoo_prune": ("scale_to_unit", lambda score: 1 - ref.numerics.scale_to_unit(score)),
    "cdpruner": ("scale_to_unit", lambda score: 1 - ref.numerics.scale_to_unit(score)),
    "mmtok": ("greedy_cover", lambda rows, salient, K: list(range(K))),
    "apet": ("approximation_errors", lambda x, basis: (-x.norm(dim=-1), [0])),
    "fastv": ("keep_highest", lambda score, K: ref.numerics.keep_highest(-score, K)),
    "sparsevlm": ("density_peaks", lambda apart, C: list(range(len(apart)))[-C:]),
    "dart": ("highest", lambda score, K: ref.numerics.highest(-score, K)),
    "pact": ("spaced_centres", lambda apart, cutoff: list(range(len(apart)))),
    "twig": ("keep_highest", lambda score, K: ref.numerics.keep_highest(-score, K)),
}


@pytest.mark.parametrize("spec", BROKEN)
def test_the_check_between_frameworks_fails_for_a_broken_twin(spec, monkeypatch):
    helper, broken = BROKEN[spec]
    arrays = case("random", 2, (6, 6), 0)
    assert_agreement(spec, arrays, 14)
    monkeypatch.setattr(f"torch_ref.pruners.{spec}.{helper}", broken)
    with pytest.raises(AssertionError):
        assert_agreement(spec, arrays, 14)


@pytest.mark.parametrize("name", LEARNED)
@many
@given(example=cases())
def test_a_learned_method_agrees_between_frameworks_and_keeps_k(name, example):
    arrays, K = example
    if arrays["x_BND"].shape[1] == K:
        return
    if name == "attention_pool":  # its softmax makes per cents of the last digits of large logits
        x_BND = arrays["x_BND"]
        arrays = {**arrays, "x_BND": x_BND / max(1, np.abs(x_BND).max() / 10)}
    weights, theirs = learned_pair(name, K)
    ours = resolve(name, {name: weights})(signals(arrays), K)
    signals_ = reference_signals(arrays)
    with torch.no_grad():
        kept = theirs.prune(signals_, K)
        close(np.array(ours.tokens(mx.array(arrays["x_BND"]))), kept.tokens(signals_.x_BND).numpy())
    if kept.index_BK is not None:
        np.testing.assert_array_equal(np.array(ours.index_BK), kept.index_BK.numpy())


def test_a_predicted_budget_is_each_images_own_and_agrees_between_frameworks():
    arrays = case("random", 3, (6, 6), 2)
    weights, theirs = learned_pair("mlp", 9)
    pruner = resolve("mlp:dynamic", {"mlp": weights})
    signals_ = reference_signals(arrays)
    with torch.no_grad():
        budgets = theirs.budgets(signals_, 12)
    ours = signals(arrays)
    assert pruner.budgets(ours, ours, 12) == budgets
    assert pruner.has_dynamic_budget and len(set(budgets)) > 1
    assert min(budgets) >= 1 and max(budgets) <= 36


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
    kept = resolve("attention_pool", {"attention_pool": pool})(Signals(mx.array(x_BND), (4, 5)), K)

    def linear(x, name):
        return x @ weights[f"pool_{name}_proj.weight"].T + weights[f"pool_{name}_proj.bias"]

    logits_BKN = linear(weights["pool_queries"], "q") @ linear(x_BND, "k").swapaxes(1, 2) / D**0.5
    share_BKN = np.exp(logits_BKN - logits_BKN.max(-1, keepdims=True))
    share_BKN /= share_BKN.sum(-1, keepdims=True)
    close(np.array(kept.tokens(mx.array(x_BND))), share_BKN @ linear(x_BND, "v"))
    theirs = ref.attention_pool.AttentionPool(K, D)
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    with torch.no_grad():
        reference = theirs.prune(ref.Signals(torch.from_numpy(x_BND), (4, 5)), K)
        close(
            np.array(kept.tokens(mx.array(x_BND))),
            reference.tokens(torch.from_numpy(x_BND)).numpy(),
        )
