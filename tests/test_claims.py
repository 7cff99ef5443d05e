"""Promises of the claims' page: the same figures by several ways of counting."""

import pytest

from benchmarks import claims, shapes
from mlx_vlm_prune.pruners import METHODS


def test_a_claim_is_counted_with_everything_inside_and_as_its_authors_did():
    full = {"vision": 400, "projector": 2, "prefill": 148, "total": 550, "token": 10}
    pruned = {"vision": 200, "projector": 1, "prefill": 49, "total": 250, "token": 5}
    told = {kind: {part: {"median": float(ms)} for part, ms in one.items()}
            for kind, one in (("full", full), ("pruned", pruned))}  # fmt: skip
    gains = claims.gains(told)
    assert gains["first_token"] == pytest.approx(550 / 250)
    assert gains["vision"] == 2
    assert gains["prefill"] == pytest.approx(148 / 49)
    assert gains["tower_left_out"] == 550 / 50  # full with its tower, pruned without
    assert gains["answer"] == pytest.approx((550 + 63 * 10) / (250 + 63 * 5))


def test_every_founding_system_has_its_claim_and_its_method_is_here():
    assert len({claim.system for claim in claims.CLAIMS}) == 5
    for claim in claims.CLAIMS:
        assert claim.pruner in METHODS and claim.shape in shapes.SHAPES
        assert claim.judged[0] == claim.pruner
