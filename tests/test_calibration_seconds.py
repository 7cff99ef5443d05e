"""The time limit of a calibration: from the environment, or an error in one sentence."""

from dataclasses import replace

import pytest
from PIL import Image

from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generate import main
from mlx_vlm_prune.generation.stream import prepare_prompt
from mlx_vlm_prune.planning import calibration
from mlx_vlm_prune.planning.calibration import (
    DEFAULT_SECONDS,
    FEWEST_ROUNDS,
    MOST_ROUNDS,
    SECONDS_VARIABLE,
    measure,
    seconds_allowed,
)
from mlx_vlm_prune.pruners import plan

from . import tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.checkpoint(tiny.reference(), folder)
    Image.new("RGB", (70, 70), "red").save(folder / "a.png")
    return folder


@pytest.mark.parametrize(("value", "limit"), [("", DEFAULT_SECONDS), ("0.5", 0.5), ("1e3", 1000.0)])
def test_the_environment_sets_the_seconds(monkeypatch, value, limit):
    monkeypatch.setenv(SECONDS_VARIABLE, value)
    assert seconds_allowed() == limit


def test_without_the_variable_the_default_holds(monkeypatch):
    monkeypatch.delenv(SECONDS_VARIABLE, raising=False)
    assert seconds_allowed() == DEFAULT_SECONDS == 8.0


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_a_value_that_is_no_number_above_0_is_refused_in_one_sentence(monkeypatch, value):
    monkeypatch.setenv(SECONDS_VARIABLE, value)
    with pytest.raises(
        UserError, match=f"^{SECONDS_VARIABLE} is '{value}'; it is a number of seconds"
    ):
        seconds_allowed()


def test_a_command_refuses_it_before_anything_is_measured(home, monkeypatch, capsys):
    monkeypatch.setenv(SECONDS_VARIABLE, "soon")
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(home / "cache"))
    monkeypatch.setattr(
        calibration, "run_once", lambda *_: pytest.fail("the value must be refused first")
    )
    with pytest.raises(SystemExit) as stop:
        main(["--model", str(home / "mlx"), "--image", str(home / "a.png"), "--prompt", "red ?",
              "--pruner", "norm", "--budget-ms", "50"])  # fmt: skip
    assert stop.value.code == 2
    assert f"error: {SECONDS_VARIABLE} is 'soon'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "run_ms", "rounds"),
    [
        ("0.001", 100.0, 2),
        ("8", 1000.0, FEWEST_ROUNDS),
        ("8", 4000.0, 2),
        ("1000", 100.0, MOST_ROUNDS),
    ],
)
def test_a_setting_is_run_as_often_as_the_time_allows(home, monkeypatch, value, run_ms, rounds):
    """Every run takes `run_ms`, whatever the clock measures."""
    monkeypatch.setenv(SECONDS_VARIABLE, value)
    real = calibration.run_once

    def run_once(model, pipeline, inputs, setting):
        run = real(model, pipeline, inputs, setting)
        return replace(run, ms=dict.fromkeys(run.ms, run_ms / len(run.ms)))

    monkeypatch.setattr(calibration, "run_once", run_once)
    model, processor = load(home / "mlx")
    calibrated = measure(
        model, plan("norm"), prepare_prompt(model, processor, "red ?", [home / "a.png"])
    )
    settings = {run.setting for run in calibrated.runs}
    assert {sum(run.setting == s for run in calibrated.runs) for s in settings} == {rounds}
