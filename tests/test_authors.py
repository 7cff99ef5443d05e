"""What the authors' own code chooses on inputs made by a formula, and what both versions here do.

A file of `tests/authors` per method: the repository and the commit that was run in float64, and for
each input what it kept. `index`: the tokens kept, ascending. `sums`: of each slot in that order
the mean of its features times 1 to D, where the method merges.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

import torch_ref.pruners as ref
from mlx_vlm_prune.pruners.numerics import precision

from .author_inputs import arrays
from .pruner_cases import float64_choices, make_pruner, reference_signals, signals

CASES = [
    pytest.param(file.stem, case, id=f"{file.stem}-{number}")
    for file in sorted((Path(__file__).parent / "authors").glob("*.json"))
    for number, case in enumerate(json.loads(file.read_text())["cases"])
]


def assert_as_authors(index_BK: Any, tokens_BKD: np.ndarray, case: dict) -> None:
    """One version keeps, and mixes, what the authors' code does."""
    if "index" in case:
        assert index_BK[0].tolist() == case["index"]
    if "sums" in case:
        sums = (tokens_BKD[0] * np.arange(1, case["D"] + 1)).mean(axis=1)
        np.testing.assert_allclose(sums, case["sums"], atol=1e-5)


def inputs(case: dict) -> dict:
    return arrays(tuple(case["grid"]), case["D"], case["kind"], case["phase"])


def check_mlx(case: dict) -> None:
    given = inputs(case)
    kept = make_pruner(case["spec"])(signals(given), case["K"])
    tokens_BKD = np.array(kept.tokens(mx.array(given["x_BND"])))
    assert_as_authors(kept.index_BK, tokens_BKD, case)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name, case", CASES)
def test_a_method_keeps_what_its_authors_code_keeps(name, case, dtype):
    with float64_choices(), precision(dtype):
        check_mlx(case)


@pytest.mark.parametrize("name, case", CASES)
def test_the_twin_keeps_what_the_authors_code_keeps(name, case):
    given, pruner = inputs(case), make_pruner(case["spec"])
    kept = ref.reduce(pruner.name, reference_signals(given), case["K"], **pruner.options)
    tokens_BKD = kept.tokens(torch.from_numpy(given["x_BND"]))
    assert_as_authors(kept.index_BK, tokens_BKD.numpy(), case)


SLIPS = {  # of a method a helper or a number, and what it is on purpose made
    "cls_attention": ("keep_highest", lambda score, K: mx.arange(K)[None]),
    "divprune": ("KEPT", 9.0),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_method_with_a_slip_put_in_on_purpose_fails_its_cases(slip, monkeypatch):
    name, broken = SLIPS[slip]
    monkeypatch.setattr(f"mlx_vlm_prune.pruners.{slip}.{name}", broken)
    with float64_choices():
        for case in (case for method, case in (p.values for p in CASES) if method == slip):
            with pytest.raises(AssertionError):
                check_mlx(case)
