"""Promises about a folder's files: weights are finite floats, and every file a regular one."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.families import read_checkpoint
from mlx_vlm_prune.checkpoints.reading.paths import LARGEST_JSON
from torch_ref.models.learned import read_learned
from torch_ref.models.loading import load_folder

from . import host_folders, llava, tiny

OTHERS = [torch.float64, torch.int8, torch.uint8, torch.int16, torch.int64, torch.bool]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return tiny.checkpoint(tiny.taught(tiny.reference()), tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return llava.write(llava.random_model(), tmp_path_factory.mktemp("published"))


def damage(folder, name, change):
    state = load_file(folder / name)
    key = next(key for key, tensor in state.items() if tensor.ndim == 2)
    save_file(state | {key: change(state[key])}, folder / name, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", OTHERS)
@pytest.mark.parametrize("kind", ["scenes", "published"])
def test_weights_that_are_no_floats_are_refused(kind, dtype, tmp_path, request):
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "model")
    damage(folder, "model.safetensors", lambda x: x.to(dtype))
    for read in (load, read_checkpoint, load_folder):
        with pytest.raises(UserError, match=r"tensor .* is "):
            read(folder)


@pytest.mark.parametrize("change", [*OTHERS, float("nan"), float("inf")])
def test_learned_weights_must_be_finite_floats(change, scenes, tmp_path):
    folder = shutil.copytree(scenes, tmp_path / "model")
    is_dtype = isinstance(change, torch.dtype)
    damage(folder, "pruners.safetensors", lambda x: x.to(change) if is_dtype else x * 0 + change)
    model, _ = load_folder(scenes)
    for read in (load, lambda folder: read_learned(folder, model)):
        with pytest.raises(UserError, match="is .*, not F32" if is_dtype else "not finite"):
            read(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
             "pruners.safetensors"]
)  # fmt: skip
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_refused(kind, name, scenes, tmp_path):
    folder = shutil.copytree(scenes, tmp_path / "model")
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is not a regular file"):
        load(folder)


def test_a_json_file_is_read_up_to_a_size(scenes, tmp_path):
    folder = shutil.copytree(scenes, tmp_path / "model")
    text = json.dumps({"x": "y" * LARGEST_JSON})
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"has {len(text)} bytes; at most {LARGEST_JSON} are read"):
        load(folder)


def test_a_pipe_in_a_folder_of_mlx_vlms_is_refused(tmp_path):
    folder = host_folders.checkpoint("qwen3_vl", tmp_path)
    (folder / "preprocessor_config.json").unlink()
    os.mkfifo(folder / "preprocessor_config.json")
    with pytest.raises(UserError, match="is not a regular file"):
        load(folder)
