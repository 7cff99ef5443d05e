"""Promises of `restore` behind methods inside the tower: what left there is counted too."""

import math

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_vlm_prune.models.towers.signals import represented_by
from mlx_vlm_prune.pruners import Reduction, Signals, plan, resolve
from torch_ref.models.towers.signals import represented_by as represented_by_reference
from torch_ref.pruners import Reduction as ReferenceReduction
from torch_ref.pruners import Signals as ReferenceSignals

from .test_model import POLICIES, pair
from .test_model import test_logits_equal_the_reference_for_every_method as check_logits

SPECS = ["tome+restore", "patch_norm+restore", "tome:keep=12+divprune+restore",
         "patch_norm:keep=13+norm+restore:decay=false", "kq_norm:keep=12+mmtok+restore",
         "tome:inflect=-1", "pixelprune:keep=12+fastv+restore"]  # fmt: skip
__all__ = ["pair"]  # a fixture
# Six tokens in a row; the last two are unlike all others and each other.
X = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.2], [0.2, -1.0]]
COUNTS = [1.0, 2.0, 1.0, 3.0, 1.0, 5.0]  # patches that each stands for so far


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spec", SPECS)
def test_logits_equal_the_reference(pair, spec, policy):
    check_logits(pair, spec, policy)


def represented_by_both(index: list[int], weight_KN: list[list[float]] | None) -> list[list[float]]:
    """What both versions count for each kept token."""
    x_1ND, counts_1N = [X], [COUNTS]
    kept = Reduction(index_BK=mx.array([index]))
    theirs = ReferenceReduction(torch.tensor([index]))
    if weight_KN is not None:
        slots = [[row[i] > 0 for row in weight_KN].index(True) for i in range(len(X))]
        kept = Reduction.merge(mx.array([index]), mx.array([slots]))
        theirs = ReferenceReduction(torch.tensor([index]), torch.tensor([weight_KN]))
    ours = represented_by(
        kept, Signals(mx.array(x_1ND), (2, 3), represented_BN=mx.array(counts_1N))
    )
    reference = ReferenceSignals(
        torch.tensor(x_1ND), (2, 3), represented_BN=torch.tensor(counts_1N)
    )
    return [ours[0].tolist(), represented_by_reference(theirs, reference)[0].tolist()]


def test_a_dropped_token_counts_for_the_kept_one_most_like_it_there():
    # 1 is like 0; 3 like 2; 4 is as far from 0 (-0.98) as from 2 (0.2): like 2; 5 like 0.
    by_hand = [1 + 2 + 5, 1 + 3 + 1]
    assert represented_by_both([0, 2], None) == [by_hand, by_hand]


def test_a_merged_token_counts_as_all_its_members():
    halves = [[0.5, 0.5, 0, 0, 0, 0], [0, 0, 0.25, 0.75, 0, 0], [0, 0, 0, 0, 0.5, 0.5]]
    assert represented_by_both([0, 2, 4], halves) == [[3, 4, 6], [3, 4, 6]]


def test_a_kept_token_gets_the_log_of_all_patches_that_it_stands_for():
    signals = Signals(mx.array([X]), (3, 4), represented_BN=mx.array([COUNTS]))
    kept = Reduction(index_BK=mx.array([[0, 2]]))
    enhancer = plan("norm+restore:decay=false").enhancer
    assert enhancer
    bias = enhancer.call(enhancer.method.attention_bias, signals, kept)[0].tolist()
    np.testing.assert_allclose(bias, [math.log(8), math.log(5)], rtol=1e-6)
    alone = signals.replace(represented_BN=None)
    bias = enhancer.call(enhancer.method.attention_bias, alone, kept)[0].tolist()
    np.testing.assert_allclose(bias, [math.log(3), math.log(3)], rtol=1e-6)


@pytest.mark.parametrize("spec", ["tome", "patch_norm", "kq_norm", "patch_norm:keep=12+tome"])
def test_all_patches_are_counted_once(pair, spec):
    pipeline = plan(f"{spec}+restore")
    budgets = pipeline.budgets(pair.ours.N, 7)
    encoded = pair.ours.run_tower(mx.array(pair.pixels), pipeline, budgets)
    counted = np.array(encoded.signals.represented_BN)
    assert counted.shape == (3, 7) and (counted.sum(axis=1) == 16).all() and counted.min() >= 1
    if spec == "tome":
        np.testing.assert_array_equal(counted, np.array(encoded.signals.size_BN))


def test_nothing_is_counted_where_no_enhancer_follows(pair):
    pipeline = plan("patch_norm")
    encoded = pair.ours.run_tower(mx.array(pair.pixels), pipeline, pipeline.budgets(16, 7))
    assert encoded.signals.get("represented_BN") is None


def test_merges_are_spread_over_the_layers_as_inflect_says():
    def left(inflect: float, layers: int = 5, N: int = 100, K: int = 40) -> list[int]:
        tome = resolve(f"tome:inflect={inflect}")
        return [n for _, _, n in tome.call(tome.method.cuts, layers, N, K)]

    # 60 tokens leave: of five shares 2, 1.5, 1, 0.5, 0, each a fifth of 60.
    assert left(-1) == [76, 58, 46, 40, 40]
    assert left(0) == [88, 76, 64, 52, 40]
    assert left(1) == [100, 94, 82, 64, 40]
    assert left(-0.5) == [82, 67, 55, 46, 40]
    with pytest.raises(ValueError, match="inflect is 2; it is from -1 to 1"):
        left(2)
    with pytest.raises(ValueError, match="and 0 with r"):
        tome = resolve("tome:r=3,inflect=-1")
        tome.call(tome.method.cuts, 5, 100, 40)


@pytest.mark.parametrize("part", ["represented_by", "nearest_slots"])
def test_the_check_fails_for_a_broken_twin(pair, part, monkeypatch):
    wrong = {
        "represented_by": lambda kept, signals: torch.ones(kept.index_BK.shape),
        "nearest_slots": lambda x_ND, index: [0] * len(x_ND),
    }
    monkeypatch.setattr(f"torch_ref.models.towers.signals.{part}", wrong[part])
    with pytest.raises(AssertionError):
        check_logits(pair, "patch_norm:keep=13+norm+restore", "keep")
