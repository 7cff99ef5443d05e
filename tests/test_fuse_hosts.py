"""Promises of `fuse` in mlx-vlm's folders: the same answers, and all other tensors as they were."""

import json
import os

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from mlx_vlm.utils import load as mlx_vlm_load

from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.reading.files import open_safetensors
from mlx_vlm_prune.fuse import main
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.prefill import HostPrefill
from mlx_vlm_prune.hosts.prompt import encode_images_and_text, prepare_prompt, prune_prompt
from mlx_vlm_prune.inputs.image import open_image
from mlx_vlm_prune.models.adapters import adapted, adapters
from mlx_vlm_prune.pruners import plan
from mlx_vlm_prune.training.processes import Processes
from mlx_vlm_prune.training.run import make_trainer

from .host_folders import desk
from .training_data import config

KINDS = ["qwen2_5_vl", "smolvlm"]
INDEX = "model.safetensors.index.json"
SETTINGS = {"group_size": 32, "bits": 4, "mode": "affine"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny checkpoint of each kind in two files, and one whose language model has few bits."""
    folder = desk(tmp_path_factory.mktemp("hosts"), KINDS)
    for kind in KINDS:
        quantize(folder / kind, folder / f"{kind}-q")
        split(folder / kind)
    line = {"image": "a.png", "question": "w7 w9", "answer": "w20"}
    (folder / "train.jsonl").write_text(json.dumps(line))
    return folder


def quantize(source, target) -> None:
    model, _ = mlx_vlm_load(str(source))
    nn.quantize(model.language_model, **SETTINGS)
    target.mkdir()
    for file in source.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    values = json.loads((source / "config.json").read_text()) | {"quantization": SETTINGS}
    (target / "config.json").write_text(json.dumps(values))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(target / "model.safetensors"), weights, metadata={"format": "mlx"})


def split(folder) -> None:
    """The weights in two files, in bfloat16 and by the names that transformers has for them."""
    weights = mx.load(str(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    names = {
        name: name.replace("language_model.model.", "model.").replace("vision_tower", "visual")
        for name in weights
    }
    if "smolvlm" in folder.name:
        names = {name: f"model.{name.replace('language_model', 'text_model')}" for name in weights}
    parts = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for name, array in weights.items():
        file = "model-2.safetensors" if ".layers.2." in name else "model-1.safetensors"
        parts[file][names[name]] = array.astype(mx.bfloat16)
    for file, tensors in parts.items():
        mx.save_safetensors(str(folder / file), tensors, metadata={"format": "mlx"})
    index = {"weight_map": {name: file for file, each in parts.items() for name in each}}
    (folder / INDEX).write_text(json.dumps(index))


def write_adapters(place, source, folder, stage="lora", **keys) -> None:
    """Adapters as if they had learned."""
    values = {"model": str(source), "dtype": "float32", "num_layers": 1, **keys}
    c = config(stage, place / "train.jsonl", folder, **values)
    learner = make_trainer(c, Processes()).learner
    random = np.random.default_rng(0)
    for _, module in adapters(learner.model):
        module.lora_b = mx.array(random.normal(0, 0.1, module.lora_b.shape).astype(np.float32))
        if "m" in module:
            module.m = module.m * mx.array(random.uniform(0.9, 1.1, module.m.shape))
    learner.save_adapters(folder, 1)


def fused(place, source, tmp_path, stage="lora", **keys):
    write_adapters(place, source, tmp_path / "a", stage, **keys)
    paths = ["--adapter-path", str(tmp_path / "a"), "--save-path", str(tmp_path / "fused")]
    main(["--model", str(source), *paths])
    return tmp_path / "fused"


def logits(place, folder, **keys) -> np.ndarray:
    """Of the first token behind a pruned picture."""
    model, processor = load(folder, dtype="float32", **keys)
    host, pipeline = host_of(model, processor), plan("divprune")
    inputs = prepare_prompt(host, "w7 w9", [open_image(place / "a.png")])
    views = encode_images_and_text(host, inputs, pipeline)
    budgets = [view.signals.x_BND.shape[1] // 2 for view in views]
    policy = "keep" if host.has_mrope else "renumber"
    prompt = prune_prompt(host, inputs, views, pipeline, budgets, policy)
    return np.array(HostPrefill(host, prompt).logits_BV)


def tensors(folder):
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in open_safetensors(file).items()
    }


def full(folder, target) -> None:
    """The folder in float32, so that nothing is rounded."""
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            each = {name: x.astype(mx.float32) for name, x in mx.load(str(file)).items()}
            mx.save_safetensors(str(target / file.name), each, metadata={"format": "mlx"})
        else:
            (target / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize("stage", ["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_folder_says_what_the_adapted_model_says(place, tmp_path, kind, stage):
    full(place / kind, tmp_path / "base")
    target = fused(place, tmp_path / "base", tmp_path, stage, num_layers=-1)
    adapted_logits = logits(place, tmp_path / "base", adapter_path=tmp_path / "a")
    np.testing.assert_allclose(logits(place, target), adapted_logits, rtol=0, atol=1e-4)
    assert np.abs(logits(place, tmp_path / "base") - adapted_logits).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_all_other_tensors_and_files_keep_their_bytes(place, tmp_path, kind):
    source = place / kind
    original = {file.name: file.read_bytes() for file in source.iterdir()}
    target = fused(place, source, tmp_path, lora_parameters={"keys": ["mlp.up_proj"]})
    assert original == {file.name: file.read_bytes() for file in source.iterdir()}
    before, after = tensors(source), tensors(target)
    assert {n: x.dtype for n, x in before.items()} == {n: x.dtype for n, x in after.items()}
    (name,) = (name for name in before if before[name] != after[name])
    assert name.endswith("layers.2.mlp.up_proj.weight") and "vision" not in name
    assert os.path.samefile(source / "model-1.safetensors", target / "model-1.safetensors")
    assert not os.path.samefile(source / "model-2.safetensors", target / "model-2.safetensors")
    for file in ("config.json", "tokenizer.json", INDEX):
        assert (target / file).read_bytes() == original[file]


@pytest.mark.parametrize("stage", ["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_is_quantized_again_and_says_so(place, tmp_path, capsys, kind, stage):
    source = place / f"{kind}-q"
    target = fused(place, source, tmp_path, stage)
    assert "7 matrices were quantized again, which rounds by" in capsys.readouterr().out
    model, _ = load(source, dtype="float32", adapter_path=tmp_path / "a")
    arrays, before = mx.load(str(target / "model.safetensors")), tensors(source)
    changed = {name for name, tensor in tensors(target).items() if tensor != before[name]}
    for name, module in adapters(model):
        exact = mx.quantize(module.fuse(dequantize=True).weight, **SETTINGS)
        for part, array in zip(("weight", "scales", "biases"), exact, strict=True):
            assert mx.array_equal(arrays[f"{name}.{part}"], array), name
            changed.discard(f"{name}.{part}")
        assert not mx.array_equal(arrays[f"{name}.weight"], adapted(module).weight)
    assert not changed
    logits(place, target)


def test_what_cannot_be_fused_is_refused_in_one_sentence(place, tmp_path, capsys):
    write_adapters(place, place / "smolvlm", tmp_path / "a")
    command = ["--model", str(place / "smolvlm"), "--save-path", str(tmp_path / "f")]
    with pytest.raises(SystemExit):
        main([*command, "--adapter-path", str(tmp_path / "a"), "--dequantize"])
    assert "mlx_vlm.convert can dequantize them first" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--adapter-path", str(tmp_path / "none")])
    assert "so no adapters" in capsys.readouterr().err


def test_a_matrix_that_is_stored_in_another_form_is_an_error(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mlx_vlm_prune.hosts.fusing._equal", lambda tensor, base: False)
    with pytest.raises(SystemExit):
        fused(place, place / "smolvlm", tmp_path)
    error = capsys.readouterr().err
    assert "holds 0 tensors that mlx-vlm reads as" in error and not (tmp_path / "fused").exists()
