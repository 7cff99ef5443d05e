"""Promises of a training run: it goes on bit for bit, whatever stops it, and says what it does."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune.train import main
from mlx_vlm_prune.training import summary, validation
from mlx_vlm_prune.training.config import TrainConfig
from mlx_vlm_prune.training.metrics import read_rows
from mlx_vlm_prune.training.processes import Processes
from mlx_vlm_prune.training.run import make_trainer
from mlx_vlm_prune.training.run_folder import claimed
from mlx_vlm_prune.training.run_state import checkpoint_folders

from .training_runs import write_data, write_model

ROOT = Path(__file__).resolve().parents[1]
WHOLE = ("weights.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a tiny model and data for it."""
    desk = tmp_path_factory.mktemp("desk")
    write_model(desk / "model")
    write_data(desk / "data")
    return desk


def arguments(desk: Path, out: Path, **more: object) -> list[str]:
    """Those of a short run, without evaluation."""
    settings = {
        "stage": "sft", "model": desk / "model/mlx", "data": desk / "data/train.jsonl",
        "output": out, "batch-size": 2, "iters": 6, "save-every": 2, "steps-per-report": 1,
        "learning-rate": 1e-3, **more,
    }  # fmt: skip
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def start(*arguments: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_vlm_prune.train", *arguments], text=True, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def read_until(process: "subprocess.Popen[str]", reports: int) -> None:
    """Its output up to a number of reports, or to its end."""
    assert process.stdout
    while reports and (line := process.stdout.readline()):
        reports -= ": loss " in line


def last(out: Path) -> Path:
    return checkpoint_folders(out)[-1]


def assert_same_end(out: Path, other: Path) -> None:
    """Bit for bit: weights, optimizer, progress; and every report once, with the same losses."""
    assert last(out).name == last(other).name
    for name in WHOLE[:2]:
        arrays, others = (mx.load(str(last(folder) / name)) for folder in (out, other))
        assert arrays.keys() == others.keys()
        for key, array in arrays.items():
            assert array.dtype == others[key].dtype and mx.array_equal(array, others[key]), key
    states = [json.loads((last(folder) / WHOLE[2]).read_text()) for folder in (out, other)]
    assert states[0]["progress"] == states[1]["progress"]
    losses = [
        [(row["iteration"], row["train_loss"]) for row in read_rows(folder / "metrics.jsonl")]
        for folder in (out, other)
    ]
    assert losses[0] == losses[1]


def refusal(capsys, *arguments: str) -> str:
    """The sentence that a command ends in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    err = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and err[-1].startswith("error: ")
    return err[-1]


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(desk, tmp_path):
    whole, killed, iters = tmp_path / "whole", tmp_path / "killed", {"iters": 24}
    main(arguments(desk, whole, **iters))
    chance, kills, resume = random.Random(7), 0, []
    for _ in range(5):
        process = start(*arguments(desk, killed, **iters), *resume)
        resume = ["--resume"]
        read_until(process, chance.randrange(1, 7))
        time.sleep(chance.random() / 50)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
        for folder in checkpoint_folders(killed):
            assert {path.name for path in folder.iterdir()} == set(WHOLE)
    main([*arguments(desk, killed, **iters), "--resume"])
    assert kills >= 3
    assert_same_end(killed, whole)
    assert not list((killed / "checkpoints").glob(".*")) and not (killed / "run.lock").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(desk, tmp_path, number):
    out = tmp_path / "out"
    settings = {"iters": 400, "save-every": 399}
    process = start(*arguments(desk, out, **settings))
    read_until(process, 3)
    process.send_signal(number)
    output, err = process.communicate()
    assert process.returncode == 130, err
    step = int(last(out).name)
    sentence = output.splitlines()[-1]
    assert sentence.startswith(f"stopped behind step {step} of 400; the same command with --resume")
    assert "Traceback" not in err and 3 <= step < 399
    settings["iters"] = step + 2
    main([*arguments(desk, out, **settings), "--resume"])
    main(arguments(desk, tmp_path / "whole", **settings))
    assert_same_end(out, tmp_path / "whole")


def test_a_full_disk_ends_in_a_sentence_with_the_last_checkpoint_whole(
    desk, tmp_path, capsys, monkeypatch
):
    out, write, left = tmp_path / "out", mx.save_safetensors, [3]

    def full(path, arrays):
        left[0] -= 1
        if left[0] < 0:
            Path(path).write_bytes(b"half")
            raise RuntimeError("[write] Unable to write 700092 bytes to file.")
        write(path, arrays)

    monkeypatch.setattr(mx, "save_safetensors", full)
    sentence = refusal(capsys, *arguments(desk, out))
    assert "0000004: [write] Unable to write" in sentence and "nothing was left" in sentence
    assert [folder.name for folder in checkpoint_folders(out)] == ["0000002"]
    assert {path.name for path in last(out).iterdir()} == set(WHOLE)
    assert not list((out / "checkpoints").glob(".*"))
    monkeypatch.undo()
    main([*arguments(desk, out), "--resume"])
    main(arguments(desk, tmp_path / "whole"))
    assert_same_end(out, tmp_path / "whole")


def test_a_half_written_report_is_dropped_when_the_run_goes_on(desk, tmp_path):
    out = tmp_path / "out"
    main(arguments(desk, out, iters=4))
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "train_lo')
    main([*arguments(desk, out), "--resume"])
    main(arguments(desk, tmp_path / "whole"))
    assert_same_end(out, tmp_path / "whole")


def test_a_loss_that_is_no_number_stops_with_the_step_and_its_examples(desk, tmp_path, capsys):
    out = tmp_path / "out"
    settings = {"learning-rate": 1e30, "save-every": 1, "optimizer": "sgd", "grad-clip": 0}
    sentence = refusal(capsys, *arguments(desk, out, **settings))
    trainer = make_trainer(TrainConfig.of(
        {"stage": "sft", "data": str(desk / "data"), "model": str(desk / "model/mlx"),
         "batch_size": 2, "output": str(out)}, "here",
    ), Processes())  # fmt: skip
    step = len(checkpoint_folders(out)) + 1
    numbers = sorted(int(i) + 1 for i in trainer.order.indices(step - 1))
    assert f"of step {step} is " in sentence and "so nothing of it was saved" in sentence
    assert f"the examples {numbers[0]}, {numbers[1]}: try a lower --learning-rate" in sentence
    weights = mx.load(str(last(out) / WHOLE[0])).values()
    assert int(last(out).name) == step - 1 and not any(mx.isnan(x).any() for x in weights)


def test_two_runs_in_one_folder_at_the_same_time_are_refused(desk, tmp_path, capsys):
    out = tmp_path / "out"
    config = TrainConfig.of({"stage": "sft", "data": "d", "output": str(out)}, "here")
    with claimed(config):
        assert "another process is training in" in refusal(capsys, *arguments(desk, out))
    assert not (out / "run.lock").exists()
    main(arguments(desk, out))


def test_a_folder_that_holds_another_run_or_something_else_is_refused(desk, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    main(arguments(desk, out, iters=2))
    before = sorted(path.name for path in out.iterdir())
    assert "holds another run; resume it" in refusal(capsys, *arguments(desk, out))
    changed = [*arguments(desk, out, seed=3), "--resume"]
    sentence = refusal(capsys, *changed)
    assert "was written with --seed 0; a run goes on with the same, not with 3" in sentence
    assert sorted(path.name for path in out.iterdir()) == before
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert "holds files of something else" in refusal(capsys, *arguments(desk, other))
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    refused = tmp_path / "refused"
    refusal(capsys, *arguments(desk, refused, data=desk / "none.jsonl"))
    refusal(capsys, *arguments(desk, tmp_path / "other/thesis.txt/x"))


def test_a_run_says_how_long_it_takes_what_moved_and_how_its_answers_are(desk, tmp_path, capsys):
    out = tmp_path / "out"
    settings = {"data": desk / "data", "steps-per-eval": 3, "freeze": "language",
                "pruner": "divprune", "keep-tokens": 8}  # fmt: skip
    main(arguments(desk, out, **settings))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sft: projector (0.00158 M) learn; tower")
    assert lines[1] == "6 examples, 3 held out; 6 steps of 2"
    assert any(line.startswith("about 1 s for 4 more steps, with 2 eval") for line in lines)
    assert any(line.startswith("step 4 of 6: loss ") and " left" in line for line in lines)
    assert "moved: projector (2 tensors); stayed, bit for bit: tower (55 tensors), language" in (
        "\n".join(lines)
    )
    assert lines[-1].endswith("--pruner divprune --keep-tokens 8 --image PICTURE --prompt QUESTION")
    rows = read_rows(out / "metrics.jsonl")
    held_out = [row for row in rows if "val_loss" in row]
    assert [row["iteration"] for row in held_out] == [0, 3, 6]
    assert all(row["val_questions"] == 3 and "val_accuracy_pruned" in row for row in held_out)
    assert [row["iteration"] for row in rows if "train_loss" in row] == [1, 2, 3, 4, 5, 6]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "curve.svg").read_text().startswith("<?xml")
    main([*arguments(desk, out, **settings), "--resume"])  # it is at its end already
    assert [row for row in read_rows(out / "metrics.jsonl")] == rows


def test_without_matplotlib_a_sentence_says_so_and_the_run_is_whole(
    desk, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    main(arguments(desk, tmp_path / "out"))
    assert "note: the curve needs matplotlib, which is not installed" in capsys.readouterr().err
    assert last(tmp_path / "out").name == "0000006"
    assert not list((tmp_path / "out").glob("curve*"))


def test_held_out_answers_are_compared_word_for_word(desk, tmp_path, monkeypatch):
    trainer = make_trainer(TrainConfig.of(
        {"stage": "sft", "data": str(desk / "data"), "model": str(desk / "model/mlx"),
         "output": str(tmp_path / "out"), "val_batches": 1, "batch_size": 3}, "here",
    ), Processes())  # fmt: skip
    assert trainer.valid
    batch = trainer.valid.batch(np.arange(3))
    assert batch
    questions = validation.ShortQuestions.of(batch)
    tokenizer = trainer.valid.processor.tokenizer
    lines = (desk / "data/valid.jsonl").read_text().splitlines()
    texts = [json.loads(line)["answer"] for line in lines]
    assert [tokenizer.decode(ids).strip() for ids in questions.right] == texts
    for prompt in questions.prompts:
        assert tokenizer.decode(prompt.ids).rstrip().endswith("assistant")
    right = [ids[:-1] for ids in questions.right]
    monkeypatch.setattr(validation, "greedy_answers", lambda *_: [right[0], right[1], [5, 5]])
    figures = trainer.evaluate()
    assert figures and figures["val_accuracy"] == pytest.approx(2 / 3)
    assert figures["val_questions"] == 3 and "val_accuracy_pruned" not in figures


def test_no_answers_are_generated_while_a_twig_learns(desk, tmp_path, monkeypatch):
    """The model stays, and so would they."""
    monkeypatch.setattr(validation, "greedy_answers", None)
    settings = {"stage": "twig", "twig-layer": 1, "twig-layers": 1, "data": desk / "data"}
    main(arguments(desk, tmp_path / "out", **settings))
    held_out = [row for row in read_rows(tmp_path / "out/metrics.jsonl") if "val_loss" in row]
    assert held_out and all("val_accuracy" not in row for row in held_out)


def test_reports_go_to_mlx_lms_callbacks(desk, tmp_path, capsys, monkeypatch):
    from mlx_lm.tuner import callbacks

    reports: list[dict] = []

    class Recorder(callbacks.TrainingCallback):
        def __init__(self, **settings):
            reports.append(settings)

        def on_train_loss_report(self, train_info):
            reports.append(train_info)

        def on_val_loss_report(self, val_info):
            reports.append(val_info)

    monkeypatch.setitem(callbacks.SUPPORT_CALLBACK, "wandb", Recorder)
    main(arguments(desk, tmp_path / "out", data=desk / "data", **{"report-to": "wandb"}))
    assert reports[0]["project_name"] == "mlx_vlm_prune"
    assert [row["iteration"] for row in reports[1:]] == [0, 1, 2, 3, 4, 5, 6, 6]
    monkeypatch.undo()
    if callbacks.swanlab is None:
        options = arguments(desk, tmp_path / "other", **{"report-to": "swanlab"})
        assert "which is not installed: pip install swanlab" in refusal(capsys, *options)


def test_a_fingerprint_changes_with_any_one_bit():
    before = mx.random.normal((3, 5))
    number = summary._fingerprint(before).item()
    for dtype, one_up in ((mx.float16, mx.uint16), (mx.bfloat16, mx.uint16)):
        half = before.astype(dtype)
        bits = half.view(one_up)
        bits[1, 1] += 1
        assert (summary._fingerprint(half) != summary._fingerprint(bits.view(dtype))).item()
    for i in range(3):
        after = mx.array(before)
        after[i, i] = np.nextafter(np.float32(after[i, i].item()), np.float32(9))
        assert summary._fingerprint(after).item() != number
    assert summary._fingerprint(mx.array(before)).item() == number


def test_a_mistake_in_the_data_is_a_mistake_of_the_run(desk, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    lines = (desk / "data/train.jsonl").read_text()
    bad.write_text(lines + '{"image": "gone.png", "question": "q", "answer": "a"}\n')
    settings = {"data": bad, "image-folder": desk / "data", "iters": 4}
    assert "gone.png" in refusal(capsys, *arguments(desk, tmp_path / "a", **settings))
    main([*arguments(desk, tmp_path / "b", **settings), "--skip-bad"])
    assert "left out: 1 examples that could not be used" in capsys.readouterr().out
    none = tmp_path / "none.jsonl"
    none.write_text('{"image": "gone.png", "question": "q", "answer": "a"}\n')
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text(lines)
    (data / "valid.jsonl").write_text(none.read_text())
    settings["data"] = data
    sentence = refusal(capsys, *arguments(desk, tmp_path / "c", **settings), "--skip-bad")
    assert sentence == "error: no held-out example can be used"
