"""Calibrations of mlx-vlm's models: which runs they have, how they grow, how they are saved."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generation.request import Request
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.machine.hardware import environment
from mlx_vlm_prune.planning import host_runs
from mlx_vlm_prune.planning.budgets import Budget
from mlx_vlm_prune.planning.calibration import LONG_TEXT
from mlx_vlm_prune.planning.host_budgets import (
    calibrate,
    keep_within,
    measure_level,
    predictor,
)
from mlx_vlm_prune.planning.host_calibration import (
    HostCalibration,
    load_host_calibration,
)
from mlx_vlm_prune.planning.host_runs import open_prompt
from mlx_vlm_prune.planning.prediction import PARTS
from mlx_vlm_prune.pruners import plan

from .host_folders import desk
from .test_host_calibration import LARGE, PICTURES, SMALL, cache, made_up, never, run

__all__ = ["cache"]  # a fixture


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return desk(tmp_path_factory.mktemp("hosts"), ["llava", "qwen2_5_vl", "smolvlm"])


@pytest.fixture(scope="module")
def loaded(place):
    from mlx_vlm_prune import load

    models = {name: load(place / name) for name in ("llava", "qwen2_5_vl", "smolvlm")}
    return models.__getitem__


def opened(place, loaded, kind: str, *names: str, spec: str = "norm", text: str = "w7 w9"):
    model, processor = loaded(kind)
    request = Request(text, [place / name for name in names or ("a.png",)], spec)
    return open_prompt(host_of(model, processor), plan(spec), request)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "smolvlm"])
def test_a_calibration_runs_sizes_from_the_least_k_to_all(place, loaded, kind):
    """A cache's row is keys and values of 3 layers, 2 heads of 16 numbers, 4 bytes each."""
    prompt = opened(place, loaded, kind, "a.png", "b.png")
    model, _ = loaded(kind)
    before = dict(vars(model.language_model))
    measured = host_runs.measure(prompt)
    assert dict(vars(model.language_model)) == before
    assert measured.pictures[-1][2] == max(prompt.tokens)
    assert [N for _, _, N in measured.pictures] == sorted(measured.sizes)
    assert len(measured.pictures) == {"llava": 1, "qwen2_5_vl": 3, "smolvlm": 2}[kind]
    assert measured.covers(prompt.text, prompt.tokens)
    assert {run.images for run in measured.runs} == {1, 2}
    for N in measured.sizes:
        runs = [run for run in measured.runs if run.N == N]
        assert {run.K for run in runs} >= {N - 1, N}
        assert all(run.rows == run.text + run.images * run.K for run in runs)
    assert all(set(r.ms) == set(r.nbytes) == set(PARTS) for r in measured.runs)
    ms = predictor(prompt, measured).ms(prompt.feasible[0], prompt.text, 2)
    assert min(ms.values()) > 0
    assert measured.row_bytes == 2 * 3 * 2 * 16 * 4


def test_where_all_pictures_are_made_as_large_a_longer_one_has_fewer_tiles(place, loaded):
    prompt = opened(place, loaded, "smolvlm")
    sizes = host_runs.timed_sizes(prompt, prompt.picture.size)
    assert [timed.N for timed in sizes] == [12, 20]
    pictures = tuple((*timed.picture.size, timed.N) for timed in sizes)
    assert HostCalibration("norm", pictures, (), {}).scaled == []


def test_smaller_pictures_of_one_shape_come_before_other_shapes(place, loaded):
    prompt = opened(place, loaded, "qwen2_5_vl")
    sizes = host_runs.timed_sizes(prompt, (224, 224))
    assert [timed.picture.size for timed in sizes] == [(56, 56), (112, 112), (224, 224)]
    assert [timed.N for timed in sizes] == [4, 16, 64]


@pytest.mark.parametrize("spec", ["fastv", "divprune+restore"])
def test_methods_of_every_stage_are_calibrated(place, loaded, spec):
    prompt = opened(place, loaded, "qwen2_5_vl", spec=spec)
    measured = host_runs.measure(prompt)
    assert measured.pruner == spec
    assert measured.sizes[max(prompt.tokens)].typical_setting[0] in prompt.feasible


def test_rows_that_leave_between_layers_are_counted_in_the_average_layer(place, loaded):
    """A millisecond a row of the average layer, and that is predicted."""
    prompt = opened(place, loaded, "llava", "a.png", "b.png", spec="fastv")
    measured = host_runs.measure(prompt)
    assert all(run.rows == run.text + run.images * run.K for run in measured.runs)
    rest = {"vision": 0.0, "pruner": 0.0}
    runs = [
        replace(run, ms=rest | {"prefill": 1.0 * run.text + run.images * run.K})
        for run in measured.runs
    ]
    predicted = predictor(prompt, replace(measured, runs=tuple(runs)))
    for K in (prompt.feasible[0], prompt.feasible[-1]):
        assert predicted.ms(K, prompt.text, 2)["prefill"] == pytest.approx(prompt.text + 2 * K)


def test_runs_read_a_prompt_as_the_answer_is_to_be_read(place, loaded):
    """Into a cache of nine rows and the three of a piece, in place of all."""
    few = {"max_kv_size": 9, "prefill_step_size": 3}
    runs = []
    for options in ({}, few):
        model, processor = loaded("llava")
        request = Request("w7 w9", [place / "a.png"], "norm", host_options=options)
        prompt = open_prompt(host_of(model, processor), plan("norm"), request)
        timed = host_runs.timed_prompt(prompt, prompt.picture.size)
        runs.append(host_runs.run_once(prompt, timed, timed.N))
    assert runs[0].rows == runs[1].rows > 12
    assert runs[1].cache_bytes <= runs[0].cache_bytes * 12 / runs[0].rows


def test_a_calibration_runs_no_prompt_that_the_model_does_not_read(place, loaded, monkeypatch):
    """Three images of 16 tokens and 16 words."""
    prompt = opened(place, loaded, "llava", *["a.png"] * 3)
    monkeypatch.setattr(type(prompt.host), "context", 64)
    sizes = host_runs.timed_sizes(prompt, prompt.picture.size)
    settings = host_runs.settings_to_run(prompt, sizes, 3, prompt.text)
    assert max(len(timed.inputs.ids) for timed, _ in settings) == 64
    assert max(len(timed.views) for timed, _ in settings) == 3


def test_what_was_covered_stays_covered(place, loaded, cache, monkeypatch):
    """Requests of two kinds: with more pictures, and with a larger one."""
    two = opened(place, loaded, "qwen2_5_vl", "b.png", "b.png")
    large = opened(place, loaded, "qwen2_5_vl", "a.png")
    assert max(large.tokens) > max(two.tokens)
    first, last = calibrate(two), calibrate(large)
    assert first is not last
    monkeypatch.setattr("mlx_vlm_prune.planning.host_budgets.measure", never)
    assert calibrate(two) is calibrate(large) is last


def test_many_small_pictures_and_a_large_one_are_not_run_as_many_large_ones(place, loaded):
    prompt = opened(place, loaded, "qwen2_5_vl")
    older = made_up(*SMALL, *LARGE, run(4, 16, images=9), pictures=((20, 20, 4), (999, 999, 16)))
    extent = host_runs.extent_of(prompt, older)
    assert extent == host_runs.Extent((999, 999), 9, LONG_TEXT)
    huge = replace(older, pictures=((20, 20, 4), (999, 999, 1 << 20)))
    many = replace(prompt, views=[[9]] * 99)
    assert host_runs.extent_of(many, huge) == host_runs.Extent(prompt.picture.size, 99, LONG_TEXT)


def test_a_saved_calibration_is_read_back_and_not_measured_again(place, loaded, cache, monkeypatch):
    prompt = opened(place, loaded, "qwen2_5_vl", "a.png", "b.png")
    measured = calibrate(prompt)
    (file,) = (cache / "calibrations").iterdir()
    dtype = host_runs.dtype_of(prompt.host)
    assert load_host_calibration(file, environment(dtype)) == measured
    monkeypatch.setattr("mlx_vlm_prune.planning.host_budgets.measure", never)
    assert calibrate(prompt) is measured
    smaller = opened(place, loaded, "qwen2_5_vl", "b.png")
    assert calibrate(smaller) is measured
    level = measure_level(smaller, measured)
    assert 0 < level < float("inf")
    with pytest.raises(AssertionError, match="must be used"):
        calibrate(opened(place, loaded, "qwen2_5_vl", *["a.png"] * 3))
    with pytest.raises(AssertionError, match="must be used"):
        calibrate(opened(place, loaded, "qwen2_5_vl", text="w7 " * 150))
    with pytest.raises(AssertionError, match="must be used"):
        calibrate(opened(place, loaded, "qwen2_5_vl", spec="divprune"))


DAMAGE = {
    "no runs": {"runs": []},
    "a picture that was not run": {"pictures": [[20, 20, 4], [40, 40, 999]]},
    "no pictures": {"pictures": []},
    "another format": {"format": 0},
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_calibration_is_replaced(tmp_path, case):
    content = {"format": 1, "about": {}, "pruner": "norm", "pictures": PICTURES,
               "runs": [vars(run) for run in SMALL + LARGE]}  # fmt: skip
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content))
    assert load_host_calibration(file, {}) == made_up()
    file.write_text(json.dumps(content | DAMAGE[case]))
    assert load_host_calibration(file, {}) is None


def test_a_size_that_the_processor_makes_another_of_is_another_machine(place, loaded):
    prompt = opened(place, loaded, "qwen2_5_vl")
    other = made_up(pictures=((90, 80, 4), (95, 85, 16)))
    assert measure_level(prompt, other) == float("inf")
    request = Request("w7 w9", [place / "a.png"], "norm")
    with pytest.raises(UserError, match="of other processor options"):
        keep_within(*loaded("qwen2_5_vl"), request, Budget(ms=9), other)


def test_nothing_is_a_prompt_without_an_image(place, loaded):
    model, processor = loaded("llava")
    with pytest.raises(UserError, match="a budget needs an image"):
        open_prompt(host_of(model, processor), plan("norm"), Request("w7", []))
