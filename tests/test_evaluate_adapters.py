"""Adapters are evaluated as a model of their own: nothing is kept about the one below them."""

import json

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_vlm_prune.evaluate import main
from mlx_vlm_prune.machine.remembered import remembered
from mlx_vlm_prune.training.stages import LEARNERS

from .training_data import config, loaded
from .training_runs import write_data, write_model


def test_adapters_are_evaluated_and_not_taken_for_the_model(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(tmp_path / "cache"))
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data", 3)
    learner = LEARNERS["lora"](loaded(model), config("lora", "x", tmp_path / "a"))
    learner.save_adapters(tmp_path / "a", 1)
    command = ["--model", str(model), "--questions", str(data / "train.jsonl"), "--pruner", "norm"]
    command += ["--out", str(tmp_path / "e.json"), "--max-tokens", "3", "--keep-tokens", "5"]
    main([*command, "--adapter-path", str(tmp_path / "a")])
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["adapter_path"] == str(tmp_path / "a")
    assert not remembered(model)
    command[command.index("--out") + 1] = str(tmp_path / "without.json")
    main(command)
    (file,) = remembered(model)
    assert "adapter_path" not in json.loads(file.read_text())
