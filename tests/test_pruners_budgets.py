"""What a method says of itself, the budgets it can hold, and what is refused.

Shapes: N tokens, D features, K kept.
"""

from dataclasses import replace
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

import torch_ref.pruners as ref
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.pruners import METHODS, Method, Reduction, Signals, Stage, plan, resolve
from mlx_vlm_prune.pruners.spec import parse

from .pruner_cases import D, make_pruner


@pytest.mark.parametrize("layers", [4, 8, 24, 32])
@pytest.mark.parametrize("N", [49, 196, 576])
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.schedule])
def test_a_decoder_method_holds_k_rows_in_the_average_layer_or_says_that_it_cannot(name, N, layers):
    for K in range(1, N, 5):
        try:
            plan = METHODS[name].schedule(layers, N, K)
        except ValueError as e:
            with pytest.raises(ValueError):
                ref.METHODS[name].schedule(layers, N, K)
            late = name == "twig" and K > 0.75 * N  # from 24 of 32 on it holds none
            assert "cannot keep" in str(e) and (K < N / 2 or late)
            continue
        assert plan == ref.METHODS[name].schedule(layers, N, K)
        held = [N] * layers
        for layer, left in sorted(plan.items()):
            assert 1 <= layer < layers and 0 <= left <= held[layer]
            held[layer:] = [left] * (layers - layer)
        above = 1 if name == "twig" else 0  # its paper rounds up
        assert K - max(2, N / layers if name == "vtw" else 2) < sum(held) / layers <= K + above


@pytest.mark.parametrize("layers", [1, 4, 12])
@pytest.mark.parametrize("spec", [n for n, m in METHODS.items() if m.cuts] + ["tome:r=3"])
def test_an_encoder_method_ends_with_k_tokens(spec, layers):
    for K in (1, 7, 48):
        pruner = make_pruner(spec)
        plan = pruner.call(pruner.method.cuts, layers, 49, K)
        assert plan == ref.Step(pruner.name, K, pruner.options).call("cuts", layers, 49, K)
        left = [n for _, _, n in plan]
        assert left[-1] == K and left == sorted(left, reverse=True) and max(left) <= 49
        assert all(
            0 <= layer < layers and place in ("before", "middle") for layer, place, _ in plan
        )


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("avgpol", "did you mean avgpool"),
        ("random:sed=3", "did you mean seed"),
        ("random:seed=x", "takes an int"),
        ("similarity:published=maybe", "takes a bool"),
        ("norm:p=1", "it has none"),
        ("attention_pool", "holds no weights"),
        ("twig", "holds no weights"),
        ("holov:beta=nan", "takes a float"),
        ("fastv:layer=inf", "takes a float"),
        ("restore", "needs one, as in"),
        ("fastv+vtw", "of which a chain can hold one"),
        ("fastv+norm", "write norm\\+fastv"),
        ("none+fastv", "leave it out"),
        ("norm:keep=5", "earlier method"),
        ("norm:keep=0+fastv", "at least 1"),
        ("norm:keep=0.0+fastv", "a whole number, at least 1, or a share below 1"),
        ("norm:keep=1.5+fastv", "a whole number, at least 1, or a share below 1"),
        ("norm:keep=nan+fastv", "takes an int"),
        ("norm:budget=dynamic", "must be similarity"),
        ("norm:budget=similarity,reference=0", "above 0, at most 2"),
        ("norm:reference=0.4", "goes with budget=similarity"),
        ("none:budget=similarity", "none takes no budget=similarity"),
        ("tome:budget=similarity", "tome takes no budget=similarity"),
        ("downsample:budget=similarity+norm", "the tower gave"),
        ("norm+fastv:budget=similarity", "ahead of the language model"),
        ("norm+restore:budget=similarity", "restore takes no budget=similarity"),
        ("downsample+restore", "nothing to restore"),
        ("tome+restore:published", "after the tower, and tome inside it"),
        ("fastv+restore:published", "ahead of the language model, and fastv inside it"),
        ("norm+restore:published,nearby", "nearby is no part of published"),
    ],
)
def test_a_wrong_pruner_or_option_is_named_with_what_there_is(spec, part):
    with pytest.raises(UserError, match=part):
        plan(spec)


def test_an_earlier_method_can_keep_a_share():
    chain = plan("patch_norm:keep=0.75+norm:keep=0.001+fastv")
    assert chain.spec == "patch_norm:keep=0.75+norm:keep=0.001+fastv"
    assert chain.budgets(196, 49).handed_on == [147, 1, 49]
    assert chain.budgets(196, 196).handed_on == [196, 196, 196]
    as_number = plan("patch_norm:keep=147+norm:keep=1+fastv").budgets(196, 49)
    assert as_number.handed_on == chain.budgets(196, 49).handed_on


@pytest.mark.parametrize("K", [0, 17])
def test_a_budget_outside_one_to_n_is_refused(K):
    with pytest.raises(UserError, match="keep 1 to 16"):
        resolve("norm")(Signals(mx.zeros((1, 16, D)), (4, 4)), K)


def test_a_selector_that_merges_is_not_completed_with_means():
    tokens = Signals(mx.zeros((1, 16, D)), (4, 4))
    with pytest.raises(UserError, match=r"restore: published .* a selector that merges none"):
        resolve("similarity+restore:published")(tokens, 6)


def test_cuts_that_descend_are_refused():
    step = plan("v2drop:first=9,second=4").decoder
    with pytest.raises(UserError, match=r"layers \[9, 4, 22\]; they must not descend"):
        step.call(step.method.schedule, 32, 64, 40)


def test_a_selector_that_was_trained_for_one_budget_chooses_no_half_of_it():
    weights = {"attention_pool": METHODS["attention_pool"].make_weights(D, 6)}
    with pytest.raises(UserError, match="attention_pool was trained for 6 visual tokens"):
        plan("attention_pool+restore:published", weights)


def test_features_that_are_not_numbers_are_refused():
    x = mx.full((1, 16, D), mx.nan)
    with pytest.raises(UserError, match="NaN"):
        resolve("norm")(Signals(x, (4, 4)), 4)


def test_a_file_with_three_names_is_a_method():
    def prune(signals: Signals, K: int, *, step: int = 1) -> Reduction:
        return Reduction(mx.arange(0, K * step, step)[None])

    file = ModuleType("mine.every", "Keep every so-manieth.")
    vars(file).update(stage=Stage.FEATURES, needs={}, prune=prune, helper=len)
    every = Method.of(file)
    assert (every.name, every.doc, every.options) == (
        "every",
        "Keep every so-manieth.",
        {"step": 1},
    )
    assert not every.learned and not every.proportional and every.positions == "keep"
    chain = parse("every:step=3", {"every": every}, {}, {})
    assert chain.trained_tokens is None and chain.signal_layers(4) == {}
    kept = chain.steps[0](Signals(mx.zeros((1, 16, D)), (4, 4)), 5)
    assert np.array(kept.index_BK[0]).tolist() == [0, 3, 6, 9, 12]


def test_options_are_read_from_signatures_and_no_network_is_built(monkeypatch):
    def refuse(self, *sizes) -> None:
        raise AssertionError("a network was built")

    monkeypatch.setattr(nn.Module, "__init__", refuse)
    fresh = {name: replace(method).options for name, method in METHODS.items() if method.learned}
    assert fresh == {
        "attention_pool": {}, "score_prune": {}, "mlp": {"dynamic": False, "layer": -1},
        "learn_prune": {"diverse": 0.1},
        "twig": {"layer": 2 / 32, "wipe": 24 / 32, "rank": 0},
    }  # fmt: skip
