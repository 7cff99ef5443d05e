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
    assert gains["tower_left_out"] == 550 / 50  # full with its tower, pruned without
    assert gains["answer"] == pytest.approx((550 + 63 * 10) / (250 + 63 * 5))


def test_a_gain_that_the_harness_does_not_tell_is_not_told_here_either():
    def row(**realised):
        gain = {part: {"realised": realised.get(part)} for part in ("total", "vision", "prefill")}
        return {"gain": gain, "gains": {"answer": 1.14, "tower_left_out": 4.2}}

    by = {claim.timed: claim for claim in claims.CLAIMS}
    assert claims.timed(by["answer"], row()) == "? (answer)"
    assert claims.timed(by["answer"], row(total=1.2)) == "1.14x (answer)"
    assert claims.timed(by["vision"], row(total=1.2)) == "? (vision)"
    assert claims.timed(by["vision"], row(vision=1.69)) == "1.69x (vision)"
    assert claims.timed(by["tower_left_out"], row(total=1.3)) == "4.20x (tower left out)"
    assert claims.timed(by[None], row(total=1.3)) == "is not here yet"


def test_every_founding_system_has_its_claim_and_its_method_is_here():
    assert len({claim.system for claim in claims.CLAIMS}) == 5
    for claim in claims.CLAIMS:
        assert claim.pruner in METHODS and claim.shape in shapes.SHAPES
        assert claim.judged[0] == claim.pruner
