"""Promises of several processes: they train as one with a larger batch, and stop together."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.machine.agreement import Agreement, LocalFault
from mlx_vlm_prune.train import main
from mlx_vlm_prune.training.config import TrainConfig
from mlx_vlm_prune.training.interrupts import StopRequest
from mlx_vlm_prune.training.metrics import read_rows
from mlx_vlm_prune.training.processes import Processes
from mlx_vlm_prune.training.run import make_trainer
from mlx_vlm_prune.training.run_state import checkpoint_folders

from .training_runs import write_data, write_model

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
TRAIN = ["-m", "mlx_vlm_prune.train"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    desk = tmp_path_factory.mktemp("desk")
    write_model(desk / "model")
    write_data(desk / "data", train=10, valid=5)
    return desk


def arguments(desk: Path, out: Path, batch_size: int, **more: object) -> list[str]:
    settings = {
        "stage": "sft", "model": desk / "model/mlx", "data": desk / "data", "output": out,
        "batch-size": batch_size, "iters": 4, "save-every": 2, "steps-per-report": 1,
        "steps-per-eval": 2, "learning-rate": 1e-3, "pruner": "divprune", "keep-tokens": 8, **more,
    }  # fmt: skip
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start_two(folder: Path, options: list[str]) -> "list[subprocess.Popen[str]]":
    """What mlx.launch starts with --backend ring -n 2; here each can be signalled."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    return [
        subprocess.Popen(
            [sys.executable, *TRAIN, *options], text=True,
            env={**ENVIRONMENT, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]  # fmt: skip


def ends(processes: "list[subprocess.Popen[str]]") -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each; none outlives this."""
    ended = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=100)
            ended.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return ended


def weights(out: Path) -> dict[str, mx.array]:
    return mx.load(str(checkpoint_folders(out)[-1] / "weights.safetensors"))


def test_two_processes_train_as_one_with_twice_the_batch(desk, tmp_path):
    launch = Path(sys.executable).with_name("mlx.launch")
    two, one = tmp_path / "two", tmp_path / "one"
    command = [str(launch), "-n", "2", "--backend", "ring", "--python", sys.executable]
    ran = subprocess.run(
        [*command, *TRAIN, *arguments(desk, two, 2)], env=ENVIRONMENT, text=True,
        capture_output=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("step 1 of 4: ") == ran.stdout.count("done: 4 steps") == 1
    main(arguments(desk, one, 4))
    rows = [read_rows(out / "metrics.jsonl") for out in (two, one)]
    assert [row["iteration"] for row in rows[0]] == [row["iteration"] for row in rows[1]]
    for row, other in zip(*rows, strict=True):
        for name in ("train_loss", "val_loss", "val_accuracy", "val_questions", "trained_tokens"):
            assert row.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-5), name
    expected = weights(one)
    for name, array in weights(two).items():
        assert np.allclose(array, expected[name], rtol=1e-5, atol=1e-5), name


def test_a_signal_to_one_stops_both_and_they_go_on_bit_for_bit(desk, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    settings = {"iters": 300, "save-every": 299, "steps-per-eval": 299}
    processes = start_two(tmp_path, arguments(desk, out, 2, **settings))
    stdout = processes[0].stdout
    assert stdout
    for line in stdout:
        if line.startswith("step 2 of"):
            break
    processes[1].send_signal(signal.SIGINT)
    (code, output, err), (other_code, other_output, _) = ends(processes)
    assert (code, other_code) == (130, 130), err
    assert "stopped behind step" in output and other_output == ""
    settings["iters"] = int(checkpoint_folders(out)[-1].name) + 2
    again = start_two(tmp_path, [*arguments(desk, out, 2, **settings), "--resume"])
    assert [code for code, *_ in ends(again)] == [0, 0]
    ended = ends(start_two(tmp_path, arguments(desk, whole, 2, **settings)))
    assert [code for code, *_ in ended] == [0, 0]
    expected = weights(whole)
    assert all(mx.array_equal(array, expected[name]) for name, array in weights(out).items())


def test_of_several_processes_none_stops_before_all_know():
    one_of_two, alone = StopRequest(2), StopRequest(1)
    for stop in (one_of_two, alone):
        with stop.on_signals():
            signal.raise_signal(signal.SIGTERM)
    assert alone.is_set and not one_of_two.is_set
    one_of_two.stop_together(1)
    assert one_of_two.is_set


def test_another_number_of_processes_cannot_go_on(desk, tmp_path, capsys):
    out = tmp_path / "out"
    main(arguments(desk, out, 2, iters=2))
    state = checkpoint_folders(out)[-1] / "state.json"
    content = json.loads(state.read_text())
    content["progress"]["processes"] = 2
    state.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stop:
        main([*arguments(desk, out, 2), "--resume"])
    assert stop.value.code == 2 and "was written by 2 processes" in capsys.readouterr().err


def test_a_mistake_of_one_ends_all_and_is_said_once(desk, tmp_path):
    out = tmp_path / "out"
    bad = tmp_path / "bad.jsonl"
    lines = (desk / "data/train.jsonl").read_text()
    bad.write_text(lines + '{"image": "gone.png", "question": "q", "answer": "a"}\n')
    settings = {"data": bad, "image-folder": desk / "data"}
    ended = ends(start_two(tmp_path, arguments(desk, out, 2, **settings)))
    errors = [err for _, _, err in ended if err]
    assert [code for code, *_ in ended] == [2, 2]
    assert len(errors) == 1 and "gone.png" in errors[0] and errors[0].startswith("error: ")
    refused = ends(start_two(tmp_path, arguments(desk, desk / "model", 2)))
    assert [code for code, *_ in refused] == [2, 2]
    assert "holds files of something else" in refused[0][2] and not refused[1][2]


@pytest.mark.parametrize("drafts", [[], ["--num-draft-tokens", "3"]], ids=["plain", "drafts"])
def test_an_evaluation_by_two_processes_is_that_of_one(desk, tmp_path, drafts):
    launch = Path(sys.executable).with_name("mlx.launch")
    options = ["-m", "mlx_vlm_prune.evaluate", "--model", str(desk / "model/mlx"),
               "--per-kind", "2", "--pruner", "divprune", "--keep-tokens", "8",
               "--batch", "5", *drafts, "--out"]  # fmt: skip
    command = [str(launch), "-n", "2", "--backend", "ring", "--python", sys.executable]
    results = []
    for start, name in ((command, "two.json"), ([sys.executable], "one.json")):
        out = tmp_path / name
        ran = subprocess.run(
            [*start, *options, str(out)], env=ENVIRONMENT, text=True, capture_output=True,
            timeout=120, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert ran.returncode == 0 and ran.stdout.count("Wrote ") == 1, ran.stderr
        results.append(json.loads(out.read_text()))
        assert len(list(tmp_path.glob("*.jsonl"))) == 0
    for result in results:
        del result["seconds"], result["date"]
        for row in result["rows"]:
            assert ("drafts" in row) == bool(drafts)
            row.get("drafts", {}).pop("tokens_per_second", None)
    assert results[0] == results[1]


class _OneOfTwo(Agreement):
    """A process beside another one, whose part of every sum is given."""

    def __init__(self, rank: int, other: float):
        self.rank, self.size, self.other = rank, 2, other

    def sum(self, values):
        return [value + self.other for value in values]


def test_what_only_another_process_meets_ends_this_one_and_what_both_meet_is_said_once():
    with pytest.raises(SystemExit) as stop, _OneOfTwo(0, other=1).together():
        pass
    assert stop.value.code == 2
    one = _OneOfTwo(1, other=0)
    with pytest.raises(LocalFault, match="mine"), one.mistakes_once(), one.together():
        raise UserError("mine")
    one.other = 1
    with pytest.raises(SystemExit), one.mistakes_once(), one.together():
        raise UserError("everyone's")


def test_machines_without_a_shared_folder_are_refused(desk, tmp_path):
    out = tmp_path / "out"
    main(arguments(desk, out, 4, iters=2))
    trainer = make_trainer(
        TrainConfig.of(
            {"stage": "sft", "model": str(desk / "model/mlx"), "data": str(desk / "data"),
             "output": str(tmp_path / "other"), "resume": True}, "here",
        ), Processes(),
    )  # fmt: skip
    trainer.processes = _OneOfTwo(1, other=2)
    trainer.processes.agree = lambda fault: fault and (_ for _ in ()).throw(fault)
    with pytest.raises(UserError, match="one folder that all machines share"):
        trainer.resume()


def test_a_full_disk_of_the_first_ends_both(desk, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("{}")
    (out / "checkpoints").write_text("no folder")
    ended = ends(start_two(tmp_path, arguments(desk, out, 2)))
    assert [code for code, *_ in ended] == [2, 2]
    assert "cannot write" in ended[0][2] and not ended[1][2]
