"""Promises of chains whose methods work in several stages, in the whole model.

Shapes: K kept.
"""

import pytest

from .test_model import POLICIES, pair
from .test_model import (
    test_cached_decoding_equals_the_cache_free_recomputation_at_every_split as check_splits,
)
from .test_model import test_logits_equal_the_reference_for_every_method as check_logits

SPECS = [
    "mustdrop", "hilo", "hilo+restore", "flowcut+restore", "window_merge:keep=12+norm+restore",
    "two_scales:keep=12+lookahead:boost=2,layer=2", "flowcut:keep=12+window_merge",
    "cls_attention:keep=12+dual_attention:key=0.3",
]  # fmt: skip
__all__ = ["pair"]  # a fixture


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spec", SPECS[:-2] + SPECS[-1:])
def test_logits_equal_the_reference(pair, spec, policy):
    check_logits(pair, spec, policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spec", ["mustdrop", "hilo", "hilo+restore"])
def test_cached_decoding_equals_the_recomputation_at_every_split(pair, spec, policy):
    check_splits(pair, spec, policy)


@pytest.mark.parametrize(
    ("spec", "broken", "wrong"),
    [
        ("hilo", "torch_ref.models.decoder.entry_bias", lambda prompt, grid, cuts: 0),
        (
            "mustdrop",
            "torch_ref.models.splice.cls_ranks",
            lambda encoded, kept: encoded.cls_attention_BN * 0,
        ),
    ],
)
def test_the_check_fails_for_a_broken_twin(pair, spec, broken, wrong, monkeypatch):
    monkeypatch.setattr(broken, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        check_logits(pair, spec, "keep")
