"""Promises of training a learned method of one's own: the file that docs/training.md shows learns
by its weights, its loss and its schedule of budgets, resumes, and is used afterwards."""

import json
import re
import shlex
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import torch_ref.pruners as ref
from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints import user_module
from mlx_vlm_prune.checkpoints.checkpoint import LEARNED_FILE
from mlx_vlm_prune.generate import main as generate
from mlx_vlm_prune.pruners import METHODS
from mlx_vlm_prune.train import main as train
from torch_ref.train import main as torch_train

from . import stage_runs

DOCS = Path(__file__).resolve().parents[1] / "docs" / "training.md"
FILES = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", DOCS.read_text("utf-8"), re.S)


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """The tables of methods, as they were before when the test is over."""
    monkeypatch.setattr(user_module, "_files", {})
    yield
    METHODS.pop("my_scorer", None)
    ref.METHODS.pop("my_scorer", None)
    ref.STAGES["features"].pop("my_scorer", None)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with the files of the documentation and a model with data, where commands run."""
    data = stage_runs.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert [name for name, _ in FILES] == ["my_scorer.py", "my_scorer_torch.py"]
    for name, text in FILES:
        Path(name).write_text(text)
    return ["--stage", "pruner", "--pruner", "./my_scorer.py", "--keep-tokens", "20", "--data",
            str(data), "--batch-size", "2", "--save-every", "2", "--noise", "0"]  # fmt: skip


def weights(folder: str) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in mx.load(f"{folder}/{LEARNED_FILE}").items()}


def test_a_file_learns_resumes_and_is_used(desk, tmp_path, capsys):
    train([*desk, "--output", "whole", "--iters", "4"])
    printed = capsys.readouterr().out
    assert "my_scorer" in printed.splitlines()[0]
    assert f"--pruner {tmp_path}/my_scorer.py" in printed  # the command that uses it
    train([*desk, "--output", "parts", "--iters", "2"])
    train([*desk, "--output", "parts", "--iters", "4", "--resume"])
    whole, parts = weights("whole"), weights("parts")
    assert {name.split(".")[0] for name in whole} >= {"my_scorer"}
    budgets = json.loads(Path("whole/run.json").read_text())
    assert budgets["pruner"] == "my_scorer"
    assert all(whole[name].tobytes() == parts[name].tobytes() for name in whole)
    text = Path("my_scorer.py").read_text()
    Path("my_scorer.py").write_text(text + "\n# another version\n")
    with pytest.raises(SystemExit) as stop:
        train([*desk, "--output", "parts", "--iters", "6", "--resume"])
    assert stop.value.code == 2
    assert "was written with another version of" in capsys.readouterr().err


def test_side_loss_and_budgets_are_the_files_own(desk, monkeypatch):
    from mlx_vlm_prune.training import learner as learners

    seen, real = [], learners.factor_loss

    def noted(model, batch, step, K, noise):
        seen.append(K)
        return real(model, batch, step, K, noise)

    monkeypatch.setattr(learners, "factor_loss", noted)
    train([*desk, "--output", "out", "--iters", "3", "--steps-per-report", "1"])
    assert seen == [20, 40, 20]  # K and twice K by turns, as the file says
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert all(line["side_loss"] > 0 for line in lines if "side_loss" in line)
    assert any("side_loss" in line for line in lines)


def test_both_frameworks_read_what_either_trained(desk, capsys):
    torch_train([*desk, "--output", "theirs", "--iters", "2"])
    assert "my_scorer.weight" in weights("theirs")
    train([*desk, "--model", "theirs", "--output", "ours", "--iters", "2"])
    assert "my_scorer starts from the model's weights" in capsys.readouterr().out
    question = ["--image", "0.png", "--prompt", stage_runs.QUESTION, "--max-tokens", "2"]
    method = ["--model", "ours", "--pruner", "./my_scorer.py", "--keep-tokens", "20"]
    generate([*method, *question, "--json", "a.json"])
    answer = json.loads(Path("a.json").read_text())
    assert (answer["pruner"], answer["visual_tokens_kept"]) == ("my_scorer", 20)


def test_the_commands_of_the_page_work(desk, monkeypatch):
    """As they stand; the data and the picture are there under their names."""
    (block,) = re.findall(r"```console\n([^`]*my_scorer[^`]*)```", DOCS.read_text("utf-8"))
    learns, asks = (shlex.split(line)[2:] for line in block.splitlines())
    Path("my-data").symlink_to(".")
    Path("photo.jpg").symlink_to("0.png")
    train([*learns, "--iters", "1", "--batch-size", "2"])
    generate([*asks, "--max-tokens", "1"])


def test_a_run_in_pytorch_goes_on_with_the_same_twin_alone(desk, capsys):
    torch_train([*desk, "--output", "theirs", "--iters", "2"])
    twin = Path("my_scorer_torch.py")
    twin.write_text(twin.read_text() + "\n# another version\n")
    with pytest.raises(SystemExit) as stop:
        torch_train([*desk, "--output", "theirs", "--iters", "4", "--resume"])
    assert stop.value.code == 2
    assert "was written with another version of" in capsys.readouterr().err


def test_a_twin_does_not_replace_a_built_in_one(desk, capsys):
    builtin = ref.METHODS["norm"]
    for name in ("norm.py", "norm_torch.py"):
        Path(name).write_text(Path(name.replace("norm", "my_scorer")).read_text())
    with pytest.raises(SystemExit) as stop:
        torch_train([*desk, "--pruner", "./norm.py", "--output", "theirs", "--iters", "1"])
    assert stop.value.code == 2 and ref.METHODS["norm"] is builtin
    assert "a pruner is called norm already" in capsys.readouterr().err


def test_without_its_file_its_weights_are_left_out_and_a_note_says_so(desk, caplog):
    train([*desk, "--output", "out", "--iters", "1"])
    METHODS.pop("my_scorer")
    caplog.set_level("INFO", "mlx_vlm_prune")
    model, _ = load("out")
    assert "my_scorer" not in model.learned
    assert "no method is called my_scorer, so its weights are left out" in caplog.text


def test_a_config_file_names_no_file_that_is_run(desk, tmp_path, capsys):
    Path("bad.py").write_text("raise RuntimeError('run')\n")
    Path("c.yaml").write_text("stage: pruner\ndata: d.jsonl\npruner: ./bad.py\nkeep_tokens: 20\n")
    rest = desk[desk.index("--data") :]
    with pytest.raises(SystemExit) as stop:
        train(["-c", "c.yaml", *rest, "--output", "out", "--iters", "1"])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "./bad.py" in printed and "RuntimeError" not in printed
