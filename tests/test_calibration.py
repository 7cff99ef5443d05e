"""A calibration: its predictions worked out by hand, and its file. No measured time is asserted."""

import errno
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.machine.hardware import environment
from mlx_vlm_prune.planning import calibration
from mlx_vlm_prune.planning.calibration import (
    calibrate,
    load_calibration,
    measure,
    settings_to_run,
)
from mlx_vlm_prune.planning.prediction import PARTS, non_decreasing
from mlx_vlm_prune.pruners import plan
from mlx_vlm_prune.pruners.budget import feasible_budgets

from . import calibrations, tiny
from .calibrations import (
    LONG_TEXT,
    RUNS,
    SHORT_TEXT,
    N,
    inputs_of,
    run,
    save_calibration,
    slowed,
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return calibrations.write_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def loaded(home):
    return load(home / "mlx")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    return calibrations.isolate(monkeypatch, tmp_path / "cache")


def test_every_number_of_images_has_its_own_prediction():
    """Two images at once take 180 in the tower, 10 % less than twice one: three take 260."""
    calibrated = calibrations.of(*RUNS, *(run(K, images=2, vision=180.0) for K in (4, N)))
    assert calibrated.ms(4, SHORT_TEXT, 2) == pytest.approx(
        {"vision": 180, "pruner": 2, "prefill": 16}
    )
    assert calibrated.ms(4, SHORT_TEXT, 3) == pytest.approx(
        {"vision": 260, "pruner": 3, "prefill": 20}
    )


def test_a_pruner_that_reads_the_text_takes_longer_with_more_of_it():
    runs = *(run(K) for K in (1, 4, 15, N)), run(4, LONG_TEXT, pruner=4.0), run(N, LONG_TEXT)
    middle = (SHORT_TEXT + LONG_TEXT) // 2
    expected = {"vision": 100, "pruner": 2.5, "prefill": 72}
    assert calibrations.of(*runs).ms(4, middle, 1) == pytest.approx(expected)


def test_beyond_the_most_rows_the_prefill_has_the_last_slope():
    """150 tokens of text and 16 of the image are 166 rows, 22 more than were run."""
    assert calibrations.of().ms(N, 150, 1)["prefill"] == pytest.approx(166)


def test_a_method_inside_the_tower_has_a_tower_time_for_every_k():
    inside = [run(K, vision=20.0 + 5 * K) for K in (1, 8, 15)]
    runs = *inside, run(N, vision=120.0), run(8, LONG_TEXT, vision=60.0)
    assert calibrations.of(*runs, in_tower=True).ms(5, SHORT_TEXT, 1)["vision"] == pytest.approx(45)
    assert calibrations.of(*runs).ms(5, SHORT_TEXT, 1)["vision"] == pytest.approx(60)  # the median


def test_many_k_are_predicted_at_once_as_one_by_one():
    calibrated = calibrations.of(*RUNS, *(run(K, images=2, vision=180.0) for K in (4, N)))
    settings = np.array([(1, 8, 1), (5, 60, 2), (N, 300, 3)])
    together = calibrated.ms(*settings.T)
    for n, setting in enumerate(settings.tolist()):
        assert {part: ms[n] for part, ms in together.items()} == calibrated.ms(*setting)


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=12))
def test_more_rows_never_take_less_time_despite_noise(values):
    fitted = non_decreasing(values)
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(fitted))
    assert sum(fitted) == pytest.approx(sum(values))
    assert non_decreasing(sorted(values)) == sorted(values)


def test_one_run_in_twenty_does_not_count():
    """Of 45 runs with three runs before them, two."""
    assert slowed(1.1, {10, 20}).slack == pytest.approx(1.0)
    assert slowed(1.1, {10, 20, 30}).slack == pytest.approx(1.1)


def test_a_machine_that_becomes_slower_for_good_needs_no_slack():
    """Half as fast from run 24 on: two runs exceed their prediction, then the level has changed."""
    assert slowed(2.0, set(range(24, 48))).slack == pytest.approx(1.0)


# With a model.


def feasible(model, spec: str) -> list[int]:
    return feasible_budgets(plan(spec), model.grid, model.config.text.num_hidden_layers)


def test_a_decoder_method_has_only_averages_that_its_schedule_allows(loaded):
    """Three layers, the first of which holds all 16: an average of K leaves 3 K - 16 after it,
    of which two layers share, and one must be left."""
    model, _ = loaded
    assert feasible(model, "fastv") == list(range(6, N))
    assert feasible(model, "norm") == list(range(1, N))
    assert feasible(model, "tome:keep=4+norm") == [1, 2, 3, 4]  # no more are left
    with pytest.raises(UserError, match="one visual token"):
        feasible_budgets(plan("norm"), (1, 1), 3)


def test_a_smaller_image_has_only_sizes_that_differ(loaded):
    model, _ = loaded
    assert feasible(model, "downsample") == [1, 2, 4, 6, 9, 12]


@pytest.mark.parametrize("spec", ["norm", "tome", "downsample", "divprune", "fastv", "tome+fastv"])
def test_a_calibration_runs_from_the_least_k_to_all(loaded, home, spec):
    model, _ = loaded
    pipeline, inputs = plan(spec), inputs_of(loaded, home, images=2)
    calibrated = measure(model, pipeline, inputs)
    settings = settings_to_run(model, pipeline, 2, inputs.text_tokens)
    assert {r.setting for r in calibrated.runs} == {*settings}
    assert {r.K for r in calibrated.runs} >= {feasible(model, spec)[0], model.N}
    assert {r.images for r in calibrated.runs} == {1, 2}
    assert calibrated.in_tower == ("tome" in spec or spec == "downsample")
    assert all(set(r.ms) == set(r.nbytes) == set(PARTS) for r in calibrated.runs)
    assert calibrated.nbytes(model.N, SHORT_TEXT, 1)["prefill"] > 0
    ms = calibrated.ms(8, 20, 1)
    assert min(ms["vision"], ms["prefill"]) > 0
    assert (ms["pruner"] > 0) == (spec not in ("tome", "downsample"))  # those are in the tower's


@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_synthetic_prompt_has_the_text_and_images_of_its_setting(loaded, images):
    model, _ = loaded
    prompt = calibration.synthetic_prompt(model, 21, images)
    begins = [begin for begin, length in prompt.runs if length == model.N]
    positions = [i for i, token in enumerate(prompt.ids) if token == tiny.IMAGE]
    assert positions == [i for begin in begins for i in range(begin, begin + model.N)]
    assert len(begins) == images and len(prompt.ids) == 21 + images * model.N


def test_a_saved_calibration_is_read_back_exactly(loaded, home, cache):
    model, processor = loaded
    calibrated = calibrate(model, processor.folder, plan("norm"), inputs_of(loaded, home))
    (file,) = (cache / "calibrations").iterdir()
    again = load_calibration(file, environment(model.dtype))
    assert again and again == calibrated
    assert again.ms(5, 11, 1) == calibrated.ms(5, 11, 1) and again.slack == calibrated.slack


def test_a_saved_calibration_is_not_measured_again(loaded, home, cache, monkeypatch):
    model, processor = loaded
    inputs, pipeline = inputs_of(loaded, home), plan("norm")
    path = save_calibration(loaded, home, cache)
    monkeypatch.setattr(calibration, "measure", never)
    calibrated = calibrate(model, processor.folder, pipeline, inputs)
    assert calibrated == load_calibration(path, environment(model.dtype))
    monkeypatch.setattr(calibration, "load_calibration", never)  # the process has it in memory
    assert calibrate(model, processor.folder, pipeline, inputs) is calibrated


def test_what_was_covered_stays_covered(loaded, home, cache, monkeypatch):
    """Two pictures with few words, then one with many."""
    model, processor = loaded
    two, wordy = inputs_of(loaded, home, images=2), inputs_of(loaded, home, prompt="a red ? " * 60)
    assert wordy.text_tokens > LONG_TEXT
    _, last = (calibrate(model, processor.folder, plan("norm"), each) for each in (two, wordy))
    monkeypatch.setattr(calibration, "measure", never)
    for inputs in (two, wordy):
        assert calibrate(model, processor.folder, plan("norm"), inputs) is last


def never(*_):
    raise AssertionError("the saved calibration must be used")


def without(key: str):
    return lambda content: json.dumps({k: v for k, v in content.items() if k != key})


DAMAGE = {
    "empty": lambda content: "",
    "cut off": lambda content: json.dumps(content)[:200],
    "no object": lambda content: "[1, 2]",
    "nested without end": lambda content: "[" * 100_000,
    "no runs": lambda content: json.dumps({**content, "runs": []}),
    "few runs": lambda content: json.dumps({**content, "runs": content["runs"][:1]}),
    "runs without N": lambda content: json.dumps({**content, "N": content["N"] + 1}),
    "runs that took no time": lambda content: json.dumps(
        {**content, "runs": [{**r, "ms": dict.fromkeys(r["ms"], 0)} for r in content["runs"]]}
    ),
    "a run that is a number": lambda content: json.dumps(
        {**content, "runs": [1, *content["runs"]]}
    ),
    "a run without prefill": lambda content: json.dumps(content).replace(
        '"prefill": ', '"was": ', 1
    ),
    "times in a list": lambda content: json.dumps(
        {**content, "runs": [{**r, "ms": [1, 2, 3]} for r in content["runs"]]}
    ),
    "a part missing": without("runs"),
    "not a number": lambda content: json.dumps(content).replace(
        '"vision": ', '"vision": NaN, "was": '
    ),
    "no time": lambda content: json.dumps(content).replace('"vision": ', '"vision": -1, "was": '),
    "words for numbers": lambda content: json.dumps({**content, "N": "sixteen"}),
    "another version": lambda content: json.dumps(
        {**content, "about": {**content["about"], "versions": 0}}
    ),
    "another format": lambda content: json.dumps({**content, "format": 0}),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_or_old_calibration_is_replaced(loaded, home, cache, case):
    model, processor = loaded
    file = save_calibration(loaded, home, cache)
    file.write_text(DAMAGE[case](json.loads(file.read_text())))
    assert load_calibration(file, environment(model.dtype)) is None
    calibrate(model, processor.folder, plan("norm"), inputs_of(loaded, home))
    assert load_calibration(file, environment(model.dtype)) is not None


@pytest.mark.parametrize("more", [{"images": 2}, {"prompt": "star " * 150}])
def test_more_images_or_text_than_were_run_are_calibrated_anew(loaded, home, cache, more):
    model, processor = loaded
    save_calibration(loaded, home, cache)
    inputs = inputs_of(loaded, home, **more)
    calibrated = calibrate(model, processor.folder, plan("norm"), inputs)
    assert max(r.text for r in calibrated.runs) >= inputs.text_tokens
    assert max(r.images for r in calibrated.runs) == len(inputs.visible)


@pytest.mark.parametrize("full", [False, True])
def test_a_cache_that_cannot_be_written_gives_a_note_and_no_error(
    loaded, home, cache, caplog, monkeypatch, full
):
    def write_text(self, *args, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    if full:
        monkeypatch.setattr(Path, "write_text", write_text)
    else:
        cache.write_text("a file where the folder would be")
    calibrate(loaded[0], loaded[1].folder, plan("norm"), inputs_of(loaded, home))
    (line,) = caplog.messages
    assert "cannot be kept" in line and str(cache) in line


def test_the_calibration_of_a_busy_machine_is_not_saved(loaded, home, cache, monkeypatch, caplog):
    busy = slowed(3.0, set(range(5, 48, 5)))
    monkeypatch.setattr(calibration, "measure", lambda *_: busy)
    monkeypatch.setattr(calibration, "BUSY_SLACK", 1.5)
    calibrate(loaded[0], loaded[1].folder, plan("norm"), inputs_of(loaded, home))
    assert "3.0 x as long as usual" in caplog.text
    assert not cache.exists()
