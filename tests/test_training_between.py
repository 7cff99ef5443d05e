"""A run goes on after a stop, in the framework that began it bit for bit, or in the other."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.training.metrics import read_rows
from mlx_vlm_prune.training.run_state import checkpoint_folders
from torch_ref.models.loading import load_folder
from torch_ref.train import main as train_command
from torch_ref.training.run import train
from torch_ref.training.stages import LEARNERS

from .training_pairs import CPU, Runs, assert_same, weights

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs.written("qwen3 and siglip", tmp_path_factory.mktemp("runs"))


SCHEDULE = {"name": "cosine_decay", "arguments": [1e-3, 6], "warmup": 2}


def run(trainer):
    """From its last checkpoint to the end."""
    trainer.resume()
    trainer.run()
    return trainer


KEYS = {"save_every": 3, "lr_schedule": SCHEDULE, "pruner": "received_attention", "keep_tokens": 9}


def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(runs, tmp_path):
    whole = run(runs.torch(runs.config("sft", str(tmp_path / "whole"), iters=6, **KEYS)))
    for iters in (3, 6):
        config = runs.config("sft", str(tmp_path / "parts"), iters=iters, **KEYS)
        parts = run(runs.torch(config))
    expected, got = weights(whole), weights(parts)
    assert all(np.array_equal(expected[name], got[name]) for name in expected)
    files = [
        checkpoint_folders(tmp_path / name)[-1] / "optimizer.safetensors"
        for name in ("whole", "parts")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("first", "then"), [("torch", "mlx"), ("mlx", "torch")])
def test_a_run_goes_on_in_the_other_framework(runs, tmp_path, first, then, optimizer):
    momentum = {"sgd": {"optimizer_config": {"momentum": 0.9}, "learning_rate": 0.05}}
    keys = KEYS | {"optimizer": optimizer} | momentum.get(optimizer, {})
    whole = run(runs.mlx(runs.config("sft", str(tmp_path / "whole"), iters=6, **keys)))
    for framework, iters in ((first, 3), (then, 6)):
        config = runs.config("sft", str(tmp_path / "parts"), iters=iters, **keys)
        second = run(getattr(runs, framework)(config))
    assert second.progress == whole.progress
    assert_same(weights(second), weights(whole), 1e-3)


def test_the_command_writes_a_model_that_either_loads(runs, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"stage: pretrain\nmodel: {runs.folder / 'model'}\ndata: {runs.folder}\n"
        f"output: {tmp_path / 'out'}\nlearning_rate: 1e-2\nbatch_size: 4\n"
    )
    train_command(["-c", str(config), "--iters", "4", "--save-every", "2"])
    out = capsys.readouterr().out
    assert "step 4 of 4: loss" in out and "held-out loss" in out and " tokens/s" in out
    assert "more steps" in out and (tmp_path / "out/curve.png").is_file()
    before, _ = load_folder(runs.folder / "model", CPU)
    after, _ = load_folder(tmp_path / "out", CPU)
    moved = {
        name
        for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True)
        if not p.equal(q)
    }
    assert moved == {name for name, _ in before.named_parameters() if "vision_proj" in name}
    model, _ = load(tmp_path / "out")
    held = model.projector.fc1.weight
    assert np.array_equal(np.array(held), after.projector[1].weight.detach().numpy())
    assert [p.name for p in checkpoint_folders(tmp_path / "out")] == ["0000002", "0000004"]
    state = json.loads((tmp_path / "out/checkpoints/0000004/state.json").read_text())
    assert state["progress"]["iteration"] == 4


def test_two_processes_train_as_one_with_twice_the_batch(runs, tmp_path):
    common = [
        "--stage", "sft", "--model", str(runs.folder / "model"), "--data", str(runs.folder),
        "--iters", "2", "--learning-rate", "1e-3", "--steps-per-report", "1", "--save-every", "2",
    ]  # fmt: skip
    train_command([*common, "--batch-size", "4", "--output", str(tmp_path / "one")])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    options = [*common, "--batch-size", "2", "--output", str(tmp_path / "two")]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "torch_ref.train", *options],
            env={**os.environ, **rendezvous, "RANK": str(rank), "PYTHONPATH": str(ROOT)},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=250) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    one, two = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for key in ("train_loss", "val_loss"):
        pairs = [(a[key], b[key]) for a, b in zip(one, two, strict=True) if key in a]
        assert pairs and all(a == pytest.approx(b, rel=1e-5) for a, b in pairs)
    files = [checkpoint_folders(tmp_path / name)[-1] for name in ("one", "two")]
    states = [load_file(folder / "weights.safetensors") for folder in files]
    assert_same(states[1], states[0], 1e-4)


MISTAKES = {
    "again": ({}, "holds another run; resume it"),
    "another seed": ({"resume": True, "seed": 7}, "was written with seed=0"),
    "another stage": ({"resume": True, "stage": "pretrain"}, "was written with stage='sft'"),
    "optimizer": ({"resume": True, "optimizer": "muon"}, "torch_ref has adam, adamw or sgd"),
    "decoder method": (
        {"resume": True, "pruner": "fastv", "keep_tokens": 12, "grad_checkpoint": True},
        "grad_checkpoint cannot be used with fastv",
    ),
    "pruner": ({"resume": True, "pruner": "divprun"}, "did you mean divprune"),
    "budget": ({"resume": True, "pruner": "divprune", "keep_tokens": 17}, "keep 1 to 16"),
    "no layers": ({"stage": "lora", "num_layers": 0}, "num_layers is 0"),
    "a text for a list": (
        {"stage": "lora", "lora_parameters": {"keys": "self_attn.q_proj"}}, "must be a list",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence(runs, tmp_path, case):
    keys, part = dict(MISTAKES[case][0]), MISTAKES[case][1]
    train(runs.config("sft", str(tmp_path / "out"), iters=1))
    with pytest.raises(UserError, match=part):
        train(runs.config(keys.pop("stage", "sft"), str(tmp_path / "out"), **keys))


def test_an_evaluation_drops_nothing(runs):
    parameters = {"rank": 8, "scale": 20.0, "dropout": 0.5}
    trainer = runs.torch(runs.config("lora", lora_parameters=parameters))
    for name, parameter in trainer.learner.parameters.items():
        if name.endswith("lora_b"):
            parameter.data.normal_()
    assert trainer.evaluate() == trainer.evaluate()
    batch = trainer.batch(0, 0)
    assert trainer.learner.loss(batch).item() != trainer.learner.loss(batch).item()


CHOICES = {
    "several processes": ("mlp", {}, {"WORLD_SIZE": "2"}, "mlp learns from whole batches"),
    "several batches": ("mlp", {"grad_accumulation_steps": 2}, {}, "mlp learns from whole batches"),
    "a chain": ("visionzip+mlp", {}, {}, "mlp learns alone"),
    "no weights": (
        "divprune", {"stage": "sft", "unfreeze": "pruner"}, {}, "divprune has nothing to learn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_a_choice_that_cannot_be_learned_is_refused(runs, monkeypatch, case):
    pruner, keys, variables, part = CHOICES[case]
    config = runs.config(**{"stage": "pruner", "pruner": pruner, "keep_tokens": 5, **keys})
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    learner = LEARNERS[config.stage]
    folder = runs.folder / "model"
    with pytest.raises(UserError, match=part):
        learner(*load_folder(folder, CPU), folder, config)
