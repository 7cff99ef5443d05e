"""Promises of where a learned pruner begins: the first line says it, and it can begin again."""

import json

import pytest

from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.checkpoint import LEARNED_FILE
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.families import read_checkpoint
from mlx_vlm_prune.checkpoints.reading.files import open_safetensors
from mlx_vlm_prune.training.run import train
from mlx_vlm_prune.training.run_state import checkpoint_folders
from tests import stage_runs, tiny
from torch_ref.training.run import train as train_in_torch

FRAMEWORKS = {"mlx": train, "torch": train_in_torch}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny.checkpoint(tiny.reference(), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return stage_runs.write(tmp_path_factory.mktemp("data"))


def weights(folder) -> dict:
    """Every tensor of a model and of the pruners beside it."""
    file = folder / LEARNED_FILE
    return {**read_checkpoint(folder).tensors, **(open_safetensors(file) if file.exists() else {})}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", ["attention_pool", "mlp", "score_prune", "learn_prune"])
def test_a_trained_pruner_begins_anew_as_one_that_never_was(
    plain, data, tmp_path, capsys, framework, name
):
    """A pool inside the model too, with another number of tokens."""

    def run(start, out: str, **keys) -> dict:
        keys = {"pruner": name, "keep_tokens": 6, **keys}
        FRAMEWORKS[framework](stage_runs.config("pruner", start, data, tmp_path / out, **keys))
        return weights(tmp_path / out)

    def first_line() -> str:
        return capsys.readouterr().out.splitlines()[0]

    run(plain, "trained", keep_tokens=5)
    assert f"; {name} starts again" in first_line()
    untrained = run(plain, "again")
    capsys.readouterr()
    assert run(tmp_path / "trained", "reset", reset_pruner=True) == untrained
    assert f"; {name} starts again" in first_line()
    assert run(tmp_path / "trained", "further", keep_tokens=5) != weights(tmp_path / "trained")
    assert f"; {name} starts from the model's weights" in first_line()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_reset_pool_beside_a_model_stays_there(data, tmp_path, framework):
    keys = {"pruner": "attention_pool", "keep_tokens": 6, "iters": 1, "reset_pruner": True}
    FRAMEWORKS[framework](stage_runs.config("pruner", None, data, tmp_path / "out", **keys))
    model, _ = load(tmp_path / "out")
    assert len(model.learned["attention_pool"].queries) == 6 and "pruner" not in model


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_twig_always_begins_anew(plain, data, tmp_path, capsys, framework):
    keys = {"twig_layer": 1, "twig_layers": 1}
    FRAMEWORKS[framework](stage_runs.config("twig", plain, data, tmp_path / "out", **keys))
    assert "; twig starts again" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("stage, keys", [
    ("lora", {}), ("twig", {}), ("pretrain", {}), ("sft", {"pruner": "divprune"}),
    ("sft", {"pruner": "mlp", "freeze": "pruner"}),
])  # fmt: skip
def test_a_reset_of_nothing_is_refused(plain, data, tmp_path, framework, stage, keys):
    with pytest.raises(UserError, match="reset_pruner"):
        config = stage_runs.config(
            stage, plain, data, tmp_path / "out", reset_pruner=True, keep_tokens=None, **keys
        )
        FRAMEWORKS[framework](config)


def test_a_checkpoint_from_before_there_was_a_key_goes_on(plain, data, tmp_path):
    out = tmp_path / "out"
    train(stage_runs.config("pretrain", plain, data, out))
    file = checkpoint_folders(out)[-1] / "state.json"
    state = json.loads(file.read_text())
    del state["config"]["reset_pruner"]
    file.write_text(json.dumps(state))
    train(stage_runs.config("pretrain", plain, data, out, iters=4, resume=True))
    assert [folder.name for folder in checkpoint_folders(out)][-1] == "0000004"
