"""Promises of how long a calibration may take: what the environment says, or one sentence."""

from dataclasses import replace

import pytest
from PIL import Image

from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generate import main
from mlx_vlm_prune.generation.stream import prepare
from mlx_vlm_prune.planning import calibration
from mlx_vlm_prune.planning.calibration import FEW, MANY, SECONDS, SWITCH, measure, seconds
from mlx_vlm_prune.pruners import plan

from . import tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.checkpoint(tiny.reference(), folder)
    Image.new("RGB", (70, 70), "red").save(folder / "a.png")
    return folder


@pytest.mark.parametrize(("value", "limit"), [("", SECONDS), ("0.5", 0.5), ("1e3", 1000.0)])
def test_the_environment_sets_the_seconds(monkeypatch, value, limit):
    monkeypatch.setenv(SWITCH, value)
    assert seconds() == limit


def test_without_it_they_are_the_usual_ones(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    assert seconds() == SECONDS == 8.0


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_what_is_no_number_above_0_is_refused_in_one_sentence(monkeypatch, value):
    monkeypatch.setenv(SWITCH, value)
    with pytest.raises(UserError, match=f"^{SWITCH} is '{value}'; it is a number of seconds"):
        seconds()


def test_a_command_says_it_before_anything_is_measured(home, monkeypatch, capsys):
    monkeypatch.setenv(SWITCH, "soon")
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(home / "cache"))
    monkeypatch.setattr(
        calibration, "run_once", lambda *_: pytest.fail("this was to be refused first")
    )
    with pytest.raises(SystemExit) as stop:
        main(["--model", str(home / "mlx"), "--image", str(home / "a.png"), "--prompt", "red ?",
              "--pruner", "norm", "--budget-ms", "50"])  # fmt: skip
    assert stop.value.code == 2
    assert f"error: {SWITCH} is 'soon'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "took", "rounds"),
    [("0.001", 100.0, 2), ("8", 1000.0, FEW), ("8", 4000.0, 2), ("1000", 100.0, MANY)],
)
def test_a_place_is_run_as_often_as_there_is_time_for(home, monkeypatch, value, took, rounds):
    """`took`: ms of a run, so of the clock nothing is asserted."""
    monkeypatch.setenv(SWITCH, value)
    real = calibration.run_once

    def run_once(model, pipeline, inputs, setting):
        run = real(model, pipeline, inputs, setting)
        return replace(run, ms=dict.fromkeys(run.ms, took / len(run.ms)))

    monkeypatch.setattr(calibration, "run_once", run_once)
    model, processor = load(home / "mlx")
    known = measure(model, plan("norm"), prepare(model, processor, "red ?", [home / "a.png"]))
    settings = {run.setting for run in known.runs}
    assert {sum(run.setting == one for run in known.runs) for one in settings} == {rounds}
