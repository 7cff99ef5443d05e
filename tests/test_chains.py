"""Chains: what each step leaves, worked out once a request and composed once a step.

Shapes: N visual tokens, K kept.
"""

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune.hosts.loading import load
from mlx_vlm_prune.pruners import Pipeline, Reduction, Stage, plan

from . import tiny


@pytest.mark.parametrize(
    ("spec", "N", "K", "left"),
    [
        ("norm", 16, 4, [4]),
        ("norm+divprune+fastv", 16, 4, [9, 6, 4]),
        ("norm+divprune+fastv", 16, 10, [16, 15, 10]),
        ("norm:keep=11+divprune", 16, 4, [11, 4]),
        ("norm:keep=11+divprune", 16, 16, [16, 16]),
        ("tome+norm:keep=7+fastv", 16, 3, [7, 7, 3]),
    ],
)
def test_each_step_leaves_half_as_much_again_as_the_next_or_what_its_keep_says(spec, N, K, left):
    budgets = plan(spec).budgets(N, K)
    assert [n for _, n in budgets.per_step] == left
    assert [step.name for step, _ in budgets.per_step] == [step.name for step in plan(spec).steps]
    assert budgets.before_last == [N, *left][-2]


def test_the_steps_of_a_stage_are_found_with_what_they_leave():
    budgets = plan("tome+norm+uniform+fastv").budgets(16, 4)
    features = [(step.name, n) for step, n in budgets.at(Stage.FEATURES)]
    assert features == [("norm", 9), ("uniform", 6)]
    assert (
        budgets.left_after(Stage.FEATURES, 14) == 6 and budgets.left_after(Stage.FEATURES, 5) == 5
    )
    assert budgets.left_after(Stage.PROJECTED, 14) == 14


def test_a_request_works_out_its_budgets_once_and_composes_a_step_once(tmp_path, monkeypatch):
    """Two steps after one inside the tower: each goes on from what the tower handed over, and
    from the whole image; a third, inside the decoder, once for each of three images."""
    model, _ = load(tiny.checkpoint(tiny.reference(), tmp_path), dtype="float32")
    calls = Counter[str]()

    def count(kind: type, name: str) -> None:
        function = getattr(kind, name)

        def counted(*arguments):
            calls[name] += 1
            return function(*arguments)

        monkeypatch.setattr(kind, name, counted)

    count(Pipeline, "budgets")
    count(Reduction, "after")
    pixels = np.random.default_rng(0).normal(size=(3, 64, 64, 3)).astype(np.float32)
    rows = [tiny.row("# and # is there a red star ?"), tiny.row("user # what is that ?")]
    before = model(rows, mx.array(pixels), plan("patch_norm:keep=13+norm+divprune+fastv"), 5)
    assert calls == {"budgets": 1, "after": 2 + 2 + 3}
    assert [step.reductions[0].slots for step in before.trace.steps[:-1]] == [13, 11, 8]
