"""Promises about a folder's files: weights are finite floats, and every file a regular one."""

import hashlib
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.__main__ import main
from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.families import read_checkpoint
from mlx_vlm_prune.checkpoints.reading import files
from mlx_vlm_prune.checkpoints.reading.paths import LARGEST_JSON
from mlx_vlm_prune.fuse import main as fuse
from mlx_vlm_prune.machine.user_cache import model_key
from mlx_vlm_prune.models.adapters import adapter_key
from mlx_vlm_prune.models.arrays import read_arrays
from torch_ref.models.learned import read_learned
from torch_ref.models.loading import load_folder

from . import host_folders, llava, tiny
from .test_convert import refused
from .test_hostile_checkpoints import conversion

OTHERS = [
    torch.float64, torch.int8, torch.uint8, torch.int16, torch.int64, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip
DTYPE = r"is (F64|I8|U8|I16|I64|BOOL|F8_E4M3|F8_E5M2)[,;]"


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
        with pytest.raises(UserError, match=DTYPE):
            read(folder)


WAYS = {
    "scenes": ("to-torch", "to-hf", "to-mlx", "to-mlx -q"), "published": ("to-mlx", "to-mlx -q"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", OTHERS)
@pytest.mark.parametrize(("kind", "way"), [(k, way) for k, ways in WAYS.items() for way in ways])
def test_no_conversion_takes_weights_that_are_no_floats(
    kind, way, dtype, tmp_path, request, capsys
):
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "model")
    damage(folder, "model.safetensors", lambda x: x.to(dtype))
    name, *options = way.split()
    capsys.readouterr()  # transformers' progress
    sentence = refused(capsys, name, folder, tmp_path / "target", *options)
    assert re.search(DTYPE, sentence) and [*tmp_path.iterdir()] == [folder]


@pytest.mark.parametrize("way", ["to-torch", "to-mlx", "to-mlx -q"])
def test_the_same_conversions_take_floats(way, scenes, tmp_path, capsys):
    name, *options = way.split()
    main([name, str(scenes), str(tmp_path / "target"), *options])
    assert (tmp_path / "target").exists()


@pytest.mark.parametrize("dtype", OTHERS[:6])
@pytest.mark.parametrize("quantize", [[], ["-q"]])
def test_a_pth_of_other_dtypes_is_refused(quantize, dtype, tmp_path, capsys):
    tiny.publish(tiny.reference(), tmp_path, torch.float32)
    tiny.write_words(tmp_path / "words")
    state = torch.load(tmp_path / "published.pth", weights_only=True)
    key = "model.layers.0.mlp.up_proj.weight"
    torch.save(state | {key: state[key].to(dtype)}, tmp_path / "published.pth")
    assert re.search(DTYPE, refused(capsys, *conversion(tmp_path), *quantize))


@pytest.mark.parametrize("change", [torch.int8, torch.float64, float("nan")])
def test_what_was_learned_beside_is_checked_by_every_conversion(change, scenes, tmp_path, capsys):
    folder = shutil.copytree(scenes, tmp_path / "model")
    is_dtype = isinstance(change, torch.dtype)
    damage(folder, "pruners.safetensors", lambda x: x.to(change) if is_dtype else x * 0 + change)
    for options in ([], ["-q"]):
        sentence = refused(capsys, "to-mlx", folder, tmp_path / "target", *options)
        assert ("not F32" if is_dtype else "not finite") in sentence


@pytest.mark.parametrize("change", [torch.int8, torch.float64, torch.bool, float("nan")])
def test_adapters_must_be_finite_floats(change, tmp_path, capsys):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    from .test_fuse import write_adapters
    from .training_runs import write_model

    model, folder = write_model(tmp_path / "model"), tmp_path / "adapters"
    write_adapters(folder, model)
    assert load(model, adapter_path=folder)
    is_dtype = isinstance(change, torch.dtype)
    damage(folder, "adapters.safetensors", lambda x: x.to(change) if is_dtype else x * 0 + change)
    paths = ["--adapter-path", str(folder), "--save-path", str(tmp_path / "fused")]
    with pytest.raises(UserError, match="not F32" if is_dtype else "not finite"):
        load(model, adapter_path=folder)
    with pytest.raises(SystemExit):
        fuse(["--model", str(model), *paths])
    assert ("not F32" if is_dtype else "not finite") in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("dtype", OTHERS)
def test_a_model_of_mlx_vlms_is_refused_too(dtype, tmp_path):
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    folder = host_folders.checkpoint("qwen2_5_vl", tmp_path)
    damage(folder, "model.safetensors", lambda x: x.to(dtype))
    with pytest.raises(UserError, match=DTYPE):
        load(folder)


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


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training_args.bin"])
def test_a_models_key_is_read_from_regular_files(name, scenes, tmp_path):
    folder = shutil.copytree(scenes, tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match="is not a regular file"):
        model_key(folder)


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


def test_each_header_is_checked_once(scenes, tmp_path, monkeypatch):
    folder = shutil.copytree(scenes, tmp_path / "model")
    (folder / "pruners.safetensors").unlink()
    checked = []
    stock = files._checked_header

    def check(path):
        checked.append(path.name)
        return stock(path)

    monkeypatch.setattr(files, "_checked_header", check)
    load(folder)
    assert checked == ["model.safetensors"]


def test_a_type_that_mlx_does_not_read_is_one_sentence(tmp_path):
    """Files of ours, too, which a training goes on from."""
    save_file({"a": torch.zeros(2, dtype=torch.float64)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"MLX cannot read .*a\.safetensors: "):
        read_arrays(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json"])
def test_the_key_of_adapters_is_read_from_regular_files(name, tmp_path):
    for file in ("adapters.safetensors", "adapter_config.json"):
        (tmp_path / file).write_bytes(file.encode())
    whole = b"adapter_config.jsonadapters.safetensors"
    assert adapter_key(tmp_path) == hashlib.sha256(whole).hexdigest()[:16]
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match="there is no such file"):
        adapter_key(tmp_path)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is not a regular file"):
        adapter_key(tmp_path)


def test_a_long_name_is_not_told_whole(scenes, tmp_path):
    folder = shutil.copytree(scenes, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    save_file(state | {"x" * 5000: torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"holds a tensor x+… that") as refusal:
        load(folder)
    assert len(str(refusal.value)) < 400
