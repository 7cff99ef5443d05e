"""What the authors' own code chooses on inputs made by a formula, and what both versions here do.

A file of `tests/authors` per method: the repository and the commit that was run in float64, and for
each input what it kept. `index`: the tokens kept, ascending. `sums`: of each slot in that order
the mean of its features times 1 to D, where the method merges. `frames`: how many the clip has.
`held`: of each layer of the language model how many tokens it reads. `small`: the grid of a smaller
image. `bias`: what is added to the attention that each slot gets, `first` that in the first layer,
`distance` for rows so far from one another. `sensitivity`: how a projector made of waves answers
small changes of each token. Where the authors' code draws at random, it was given the draw that is
made here.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

import torch_ref.pruners as ref
from mlx_vlm_prune.models.towers.signals import Cut, TowerPass
from mlx_vlm_prune.pruners import METHODS, Signals
from mlx_vlm_prune.pruners.downsample import smaller_grid
from mlx_vlm_prune.pruners.numerics import precision
from torch_ref.models.towers.signals import Encoded
from torch_ref.pruners.downsample import smaller_grid as ref_smaller_grid

from .author_inputs import arrays, wave
from .pruner_cases import (
    float64_choices,
    make_pruner,
    reference_reduction,
    reference_signals,
    signals,
)

AUTHORS = Path(__file__).parent / "authors"
ALL_CASES = [
    pytest.param(file.stem, case, id=f"{file.stem}-{number}")
    for file in sorted(AUTHORS.glob("*.json"))
    for number, case in enumerate(json.loads(file.read_text())["cases"])
]
CASES = [case for case in ALL_CASES if "index" in case.values[1] or "sums" in case.values[1]]
WITH_BIASES = [case.values[1] for case in ALL_CASES if "bias" in case.values[1]]
WITH_PROBES = [case.values[1] for case in ALL_CASES if "sensitivity" in case.values[1]]
WITHOUT_TOKENS = [case for case in ALL_CASES if case not in CASES]


def assert_as_authors(index_BK: Any, tokens_BKD: np.ndarray, case: dict) -> None:
    """One version keeps, and mixes, what the authors' code does."""
    if "index" in case:
        assert index_BK[0].tolist() == case["index"]
    if "sums" in case:
        sums = (tokens_BKD[0] * np.arange(1, case["D"] + 1)).mean(axis=1)
        np.testing.assert_allclose(sums, case["sums"], atol=1e-5)


def inputs(case: dict) -> dict:
    return arrays(tuple(case["grid"]), case["D"], case["kind"], case["phase"])


def has_cls(case: dict) -> bool:
    """Did a CLS token stand before the others in the authors' run?"""
    return case.get("has_cls", True)


def check_mlx(case: dict) -> None:
    given = inputs(case)
    tokens = signals(given).replace(has_cls=has_cls(case), frames=case.get("frames", 1))
    kept = make_pruner(case["spec"])(tokens, case["K"])
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
    kept = reference_reduction(pruner, given, case["K"], has_cls(case), case.get("frames", 1))
    tokens_BKD = kept.tokens(torch.from_numpy(given["x_BND"]))
    assert_as_authors(kept.index_BK, tokens_BKD.numpy(), case)


@pytest.mark.parametrize("case", WITH_BIASES)
def test_attention_gets_what_the_authors_code_adds(case):
    given, pruner, K = inputs(case), make_pruner(case["spec"]), case["K"]
    given_torch, enhancer = reference_signals(given), pruner.enhancer
    N, farthest = given["x_BND"].shape[1], max(map(int, case["distance"]))
    step = ref.Step(enhancer.name, None, enhancer.options)
    ours, theirs = pruner(signals(given), K), reference_reduction(pruner, given, K)
    bias = enhancer.call(enhancer.method.prompt_bias, signals(given), ours)
    twin_bias = step.call("prompt_bias", given_torch, theirs)
    first, distance_P = enhancer.call(enhancer.method.calibration, N, K, farthest + 1)
    twin_first, twin_distance_P = step.call("calibration", N, K, farthest + 1)
    for bias_BK, first_bias, table_P in (
        (np.array(bias), first, np.array(distance_P)),
        (twin_bias.numpy(), twin_first, twin_distance_P.numpy()),
    ):
        np.testing.assert_allclose(bias_BK[0], case["bias"], atol=2e-6)
        assert first_bias == pytest.approx(case["first"], abs=2e-6)
        for distance, added in case["distance"].items():
            assert table_P[int(distance)] == pytest.approx(added, abs=2e-6)


@pytest.mark.parametrize("case", WITH_PROBES)
def test_a_probed_projector_answers_what_the_authors_code_finds(case):
    """The projector: tanh between two matrices of waves, 16 directions of seed 3, step 0.05."""
    D, features = case["D"], inputs(case)["features_BND"]
    wide, narrow = wave(D, 2 * D, 0.9, 0.4)[0], wave(2 * D, D, 0.6, 1.7)[0]
    options = {"directions": 16, "step": 0.05, "seed": 3}
    ours = METHODS["zoo_prune"].probe(
        lambda x: mx.tanh(x @ mx.array(wide)) @ mx.array(narrow), mx.array(features), **options
    )
    wide, narrow = (torch.from_numpy(matrix).double() for matrix in (wide, narrow))
    theirs = ref.METHODS["zoo_prune"].probe(
        lambda x: torch.tanh(x @ wide) @ narrow, torch.from_numpy(features).double(), **options
    )
    np.testing.assert_allclose(np.array(ours)[0], case["sensitivity"], rtol=1e-5)
    np.testing.assert_allclose(theirs[0].numpy(), case["sensitivity"], atol=1e-7)


@pytest.mark.parametrize("name, case", WITHOUT_TOKENS)
def test_layers_and_grids_are_those_of_the_authors_code(name, case):
    grid, K = tuple(case["grid"]), case["K"]
    if "small" in case:
        assert smaller_grid(grid, K) == ref_smaller_grid(grid, K) == tuple(case["small"])
        return
    layers, N = len(case["held"]), grid[0] * grid[1]
    for method in (METHODS[name], ref.METHODS[name]):
        held = [N] * layers
        for layer, left in method.schedule(layers, N, K).items():
            held[layer:] = [left] * (layers - layer)
        assert held == case["held"]
    assert METHODS[name].positions == "keep"


def test_a_method_names_the_code_that_was_run():
    files = {file.stem: json.loads(file.read_text()) for file in AUTHORS.glob("*.json")}
    run = {name: f"{file['repository']}@{file['commit'][:7]}" for name, file in files.items()}
    assert run == {n: m.authors_code for n, m in METHODS.items() if m.authors_code}


SLIPS = {  # of a method a helper or a number, and what it is on purpose made
    "cls_attention": ("keep_highest", lambda score, K: mx.arange(K)[None]),
    "divprune": ("KEPT", 9.0),
    "mmtok": ("LEAST_POWER", 1.0),
    "vispruner": ("leaving_of", lambda R, least: 1),
    "holov": ("seats", lambda score, K: mx.zeros(score.shape, mx.int32)),
    "tome": ("unit", lambda x: x.astype(mx.float64)),
    "restore": ("anchors", lambda x, M: mx.arange(M, dtype=mx.int32)[None]),
    "prunesid": ("direction_of_each", lambda x_ND, count: np.arange(len(x_ND)) % count),
    "zoo_prune": ("scale_to_unit", lambda moved_BN: 1 / moved_BN),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_method_with_a_slip_put_in_on_purpose_fails_its_cases(slip, monkeypatch):
    name, broken = SLIPS[slip]
    monkeypatch.setattr(f"mlx_vlm_prune.pruners.{slip}.{name}", broken)
    with float64_choices():
        for case in (case for method, case in (p.values for p in CASES) if method == slip):
            with pytest.raises(AssertionError):
                check_mlx(case)


@pytest.mark.parametrize(
    "cls, groups", [(1, [[0, 5], [1], [2, 3, 4], [6, 7]]), (0, [[0, 5, 6, 7], [1], [2, 4], [3]])]
)
def test_the_next_layer_of_tome_deals_what_is_left_of_a_then_b(cls, groups):
    """facebookresearch/ToMe@af95e4b on (cos i², sin i²), 8 tokens, then 6, then 4."""
    x_ND = np.array([[np.cos(i * i), np.sin(i * i)] for i in range(8)], np.float32)
    cuts = [Cut(layer, "middle", K, make_pruner("tome")) for layer, K in ((0, 6), (1, 4))]
    tower = TowerPass(Signals(mx.array(x_ND[None]), (2, 4)), {}, 2, cuts, has_cls=bool(cls))
    x_BSD = mx.array(np.concatenate([np.ones((cls, 2), np.float32), x_ND])[None])
    signals_ = ref.Signals(
        torch.from_numpy(x_ND)[None], (2, 4), bool(cls), size_BN=torch.ones(1, 8)
    )
    with float64_choices():
        for layer in range(2):
            x_BSD = tower.cut(x_BSD, layer, "middle", {"keys_BNHd": x_BSD[:, cls:, None]})
        mixed_KN = np.array(tower.kept.mixture(8)[0])
    run = Encoded(signals_, None, torch.ones(1, cls, 2), 8)
    for K in (6, 4):
        run = run.cut(ref.Step("tome"), K, keys_BNHd=run.signals.x_BND[:, :, None])
    for weight_KN in (mixed_KN, run.kept.weight_BKN[0].numpy()):
        assert sorted(np.flatnonzero(row_N).tolist() for row_N in weight_KN) == groups
