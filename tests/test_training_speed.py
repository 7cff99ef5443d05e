"""Promises of the benchmark of training: equal losses or nothing is timed, turns, the page."""

import json
from pathlib import Path

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from benchmarks import command_line, training_sides, training_speed
from benchmarks.readme_tables import training_table
from benchmarks.report import fill

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--size", "tiny", "--small", "tiny", "--runs", "2"]
GROUP = training_speed.Group("lora", ("mlx-vlm", "ours", "ours, pruned"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    training_sides.write_model(folder, "tiny")
    return str(folder)


@pytest.mark.parametrize("stage", ["lora", "sft"])
def test_ours_and_the_reference_take_the_same_steps(folder, stage):
    losses = []
    for side in ("ours", "torch_ref"):
        steps = training_sides.SIDES[side](training_sides.Case(side, folder, "tiny", stage))
        losses.append([next(steps)[1] for _ in range(1 if stage == "lora" else 3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_last_line_is_json_and_it_is_saved(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command_line, "RESULTS", tmp_path)
    monkeypatch.setattr(training_speed, "GROUPS", (GROUP,))
    training_speed.main([*TINY, "--save"])
    *_, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert json.loads((tmp_path / "training_speed.json").read_text()) == result
    assert [row["name"] for row in result["rows"]] == list(GROUP.names)
    assert result["versions"]["mlx-vlm"]
    theirs, ours, pruned = result["rows"]
    assert not theirs["gains"] and ours["gains"].keys() == {"mlx-vlm"}
    assert pruned["gains"].keys() == {"ours"}
    for row in result["rows"]:
        assert row["runs"] == 2 and row["tokens"] == 128
        assert row["peak_bytes"]["process"] > row["peak_bytes"]["mlx"] > 0
    assert training_table(tmp_path).count("| lora | float32 |") == 3


def test_another_first_loss_is_refused(monkeypatch, folder):
    monkeypatch.setattr(training_speed.Process, "warm_up", lambda self: None)
    args = training_speed.parse(TINY)
    with pytest.raises(training_speed.UserError, match="nothing is timed unless they are equal"):
        training_speed.require_equal(GROUP, {"ours": 2.0, "torch_ref": 2.1}, folder, args)


def test_a_side_that_cannot_train_is_said_in_one_sentence(folder):
    case = training_sides.Case("ours", folder, "tiny", "sft", dtype="float99")
    with training_speed.Process(case) as process, pytest.raises(training_speed.UserError) as fault:
        process.warm_up()
    assert "ours cannot train" in str(fault.value) and "float99" in str(fault.value)


@pytest.mark.parametrize("argv", [["--keep-ratio", "0"], ["--size", "huge"], ["--runs", "0"]])
def test_a_mistake_ends_in_one_sentence(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        training_speed.main(argv)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_table_is_that_of_the_results():
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    assert "<!-- table training -->" in page and fill(page) == page
