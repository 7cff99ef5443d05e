"""Promises of chains whose methods work in several stages, in the whole model.

Shapes: K kept.
"""

import mlx.core as mx
import pytest

from mlx_vlm_prune.pruners import METHODS, plan

from . import tiny
from .test_model import CHOOSING, POLICIES, K, pair
from .test_model import (
    test_cached_decoding_equals_the_cache_free_recomputation_at_every_split as check_splits,
)
from .test_model import test_logits_equal_the_reference_for_every_method as check_logits

SPECS = [
    "mustdrop", "hilo", "hilo+restore", "flowcut+restore", "window_merge:keep=12+norm+restore",
    "two_scales:keep=12+lookahead:boost=2,layer=2",
    "cls_attention:keep=12+dual_attention:key=0.3",
]  # fmt: skip
__all__ = ["pair"]  # a fixture


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spec", SPECS)
def test_logits_equal_the_reference(pair, spec, policy):
    check_logits(pair, spec, policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spec", ["mustdrop", "hilo", "hilo+restore"])
def test_cached_decoding_equals_the_recomputation_at_every_split(pair, spec, policy):
    check_splits(pair, spec, policy)


@pytest.mark.parametrize("name", CHOOSING)
def test_words_decide_what_stays_by_the_methods_that_say_so(pair, name):
    """The words behind a picture change nothing of its rows, and so what other methods keep."""
    kept = set()
    for words in ("?", "is there a red star ?", "how many pictures is the user in ?", "user red"):
        prefill = pair.ours(
            [tiny.row(f"# {words}")], mx.array(pair.pixels[:1]), plan(name, pair.ours.learned), K
        )
        kept.add(str([prefill.trace.kept(0, step) for step in range(len(prefill.trace.steps))]))
    assert (len(kept) > 1) == METHODS[name].reads_prompt


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
    with pytest.raises(AssertionError):
        check_logits(pair, spec, "keep")
