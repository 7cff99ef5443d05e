"""Promises of a run that failed: what it keeps, how it goes on, and what it leaves to the next."""

import json
import shutil

import pytest

from mlx_vlm_prune.train import main
from mlx_vlm_prune.training.metrics import read_rows
from mlx_vlm_prune.training.run_state import checkpoint_folders

from .test_training_run import arguments, last, refusal
from .training_runs import write_data, write_model


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a tiny model and data for it."""
    desk = tmp_path_factory.mktemp("desk")
    write_model(desk / "model")
    write_data(desk / "data")
    return desk


def test_a_step_that_cannot_be_taken_keeps_those_before_it_and_the_advice_can_be_followed(
    desk, tmp_path, capsys
):
    out, bad = tmp_path / "out", tmp_path / "bad.jsonl"
    lines = (desk / "data/train.jsonl").read_text()
    bad.write_text(lines + '{"image": "gone.png", "question": "q", "answer": "a"}\n')
    settings = {"data": bad, "image-folder": desk / "data", "save-every": 99, "batch-size": 1}
    assert "gone.png" in refusal(capsys, *arguments(desk, out, seed=1, **settings))
    steps = len(read_rows(out / "metrics.jsonl"))
    assert steps and int(last(out).name) == steps
    again = [*arguments(desk, out, seed=1, **settings | {"learning-rate": 1e-4}), "--skip-bad"]
    main([*again, "--resume"])
    assert "learning-rate was 0.001, and is 0.0001 from here on" in capsys.readouterr().err
    rates = [row["learning_rate"] for row in read_rows(out / "metrics.jsonl")]
    assert rates == pytest.approx([1e-3] * steps + [1e-4] * (6 - steps))


def test_a_run_that_kept_nothing_leaves_nothing_to_the_next(desk, tmp_path, capsys):
    out = tmp_path / "out"
    settings = {"data": desk / "data", "optimizer": "sgd", "grad-clip": 0}
    refusal(capsys, *arguments(desk, out, **settings | {"learning-rate": 1e38, "save-every": 9}))
    for folder in checkpoint_folders(out):
        shutil.rmtree(folder)
    (out / ".run.json.part-1").write_text("{")
    main(arguments(desk, out, **settings))
    assert json.loads((out / "run.json").read_text())["learning_rate"] == 1e-3
    rows = [row for row in read_rows(out / "metrics.jsonl") if "val_loss" in row]
    assert [row["iteration"] for row in rows] == [0, 6]
    (out / "run.json").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".run.json.part-1").write_text("{")
    main([*arguments(desk, empty, iters=1), "--resume"])
    assert f"there is no checkpoint in {empty}" in capsys.readouterr().err


def test_a_run_of_bad_examples_alone_writes_no_model(desk, tmp_path, capsys):
    none, out = tmp_path / "none.jsonl", tmp_path / "out"
    none.write_text('{"image": "gone.png", "question": "q", "answer": "a"}\n' * 3)
    sentence = refusal(capsys, *arguments(desk, out, data=none), "--skip-bad")
    assert "can be used, so nothing was learned" in sentence
    assert not checkpoint_folders(out) and not (out / "config.json").exists()


def test_other_examples_are_refused_and_the_same_path_written_otherwise_is_not(
    desk, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    data = shutil.copytree(desk / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    main(arguments(desk, out, data="data/train.jsonl", iters=2))
    main([*arguments(desk, out, data="./data/train.jsonl", iters=3), "--resume"])
    lines = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(lines + lines.splitlines()[0] + "\n")
    sentence = refusal(capsys, *arguments(desk, out, data="data/train.jsonl"), "--resume")
    assert "was written with 6 examples" in sentence and "has 7" in sentence


def test_of_mlp_the_answers_loss_is_reported_apart(desk, tmp_path, capsys):
    settings = {"stage": "pruner", "pruner": "mlp", "keep-tokens": 4, "iters": 2}
    main(arguments(desk, tmp_path / "out", **settings))
    rows = read_rows(tmp_path / "out/metrics.jsonl")
    assert all(row["side_loss"] > 0 and row["train_loss"] > 0 for row in rows)
    split = arguments(desk, tmp_path / "b", **settings, **{"grad-accumulation-steps": 2})
    assert "mlp learns from whole batches" in refusal(capsys, *split)
