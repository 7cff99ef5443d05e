"""Promises of `attach`: pruning that lasts until it is detached, and leaves no half of itself."""

import gc
from typing import Any
from weakref import ref

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune import attach, pruned

from .host_models import KINDS, cached_models
from .host_reference import stock
from .test_pruned import held

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")


@pytest.fixture(scope="module")
def models():
    return cached_models()


@pytest.mark.parametrize("name", KINDS)
def test_until_it_is_detached_it_prunes_as_a_block_does(models, name):
    model, inputs = models(name), KINDS[name].inputs(models(name))
    before = held(model)
    with pruned(model, "vispruner", keep_ratio=0.25):
        expected, expected_odds = stock(model, inputs)
    report, detach = attach(model, "vispruner", keep_ratio=0.25)
    tokens, odds = stock(model, inputs)
    assert tokens == expected
    np.testing.assert_array_equal(odds, expected_odds)
    assert 0 < report.kept < report.total
    detach()
    detach()  # a second time there is nothing to take off
    assert held(model) == before


def refusing(kind: type, attribute: str) -> type:
    """A class whose instances cannot be given that attribute."""

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name == attribute:
            raise ZeroDivisionError
        kind.__setattr__(self, name, value)

    return type(kind.__name__, (kind,), {"__setattr__": __setattr__})


@pytest.mark.parametrize("attribute", ["__class__", "get_input_embeddings", "apc_key_dependencies"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_where_a_step_fails_those_before_it_are_undone(name, attribute):
    model = KINDS[name].make()
    part = model.language_model if attribute == "__class__" else model
    part.__class__ = refusing(type(part), attribute)
    inputs, before = KINDS[name].inputs(model), held(model)
    expected = stock(model, inputs)[1]
    before = held(model)
    with pytest.raises(ZeroDivisionError):
        attach(model, "norm", keep_ratio=0.25)
    assert held(model) == before
    np.testing.assert_array_equal(stock(model, inputs)[1], expected)


def test_it_needs_no_weights_yet():
    """As in a model's `__init__`; what is loaded later is what answers."""
    whole, model = KINDS["llava"].make(), KINDS["llava"].make()
    inputs = KINDS["llava"].inputs(whole)
    model.load_weights([(n, mx.zeros_like(a)) for n, a in flat(model)])
    attach(model, "divprune", keep_ratio=0.25)
    model.load_weights(flat(whole))
    with pruned(whole, "divprune", keep_ratio=0.25):
        expected = stock(whole, inputs)[1]
    np.testing.assert_array_equal(stock(model, inputs)[1], expected)


def flat(model: Any) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_a_model_that_nobody_holds_any_more_is_freed_at_once(name):
    """Its weights are gigabytes, and a cycle would keep them until somebody collects it."""
    model = KINDS[name].make()
    gc.disable()
    try:
        with pruned(model, "norm", keep_ratio=0.5):
            stock(model, KINDS[name].inputs(model))
        attach(model, "norm", keep_ratio=0.5)
        stock(model, KINDS[name].inputs(model))
        held_by_nobody = ref(model)
        del model
        assert held_by_nobody() is None
    finally:
        gc.enable()
