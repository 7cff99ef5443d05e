"""Promises of `fuse`: the fused model says what the adapted one says, and nothing is dropped."""

import json

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from convert.__main__ import main as convert
from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.families import read_checkpoint
from mlx_vlm_prune.checkpoints.reading.files import open_safetensors
from mlx_vlm_prune.fuse import main
from mlx_vlm_prune.generate import main as generate_main
from mlx_vlm_prune.models.adapters import adapters
from mlx_vlm_prune.scenes import CHECKPOINT
from mlx_vlm_prune.training.stages import LEARNERS

from . import backbones, generations, llava, tiny
from .test_generations import converted
from .training_data import batch, config, loaded, logits
from .training_runs import write_data, write_model

PICTURE = batch([tiny.row("what is # ?")], 1, 64)
EVERYWHERE = {"keys": ["self_attn.q_proj", "mlp.down_proj", "embed_tokens"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("fuse") / "model")


def write_adapters(folder, model, stage: str = "lora", size: float = 0.1, **keys) -> None:
    """Adapters as if they had learned, of a model in a folder."""
    learner = LEARNERS[stage](
        loaded(model), config(stage, "x", folder, model=model and str(model), **keys)
    )
    random = np.random.default_rng(0)
    for _, module in adapters(learner.model):
        shape = module.lora_b.shape
        module.lora_b = mx.array(random.normal(0, size, shape).astype(np.float32))
        if "m" in module:
            module.m = module.m * mx.array(random.uniform(0.9, 1.1, module.m.shape))
    if keys.get("unfreeze"):
        learner.model.projector.bias = learner.model.projector.bias + 0.5
    learner.save_adapters(folder, 1)


def fused(model, folder, *options: str):
    """What `fuse` makes of FOLDER/adapters."""
    source = ["--model", str(model)] if model else []
    paths = ["--adapter-path", str(folder / "adapters"), "--save-path", str(folder / "fused")]
    main([*source, *paths, *options])
    return folder / "fused"


def adapted(model, folder):
    return load(model, adapter_path=folder / "adapters", dtype="float32")[0]


def close(one: np.ndarray, two: np.ndarray, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(one, two, rtol=0, atol=tolerance * np.abs(two).max())


@pytest.mark.parametrize("stage", ["lora", "dora"])
@pytest.mark.parametrize("parameters", [{}, EVERYWHERE])
def test_a_fused_model_says_what_the_adapted_one_says(model, tmp_path, stage, parameters):
    write_adapters(
        tmp_path / "adapters", model, stage, lora_parameters=parameters, unfreeze=["projector"]
    )
    target = fused(model, tmp_path)
    expected = logits(adapted(model, tmp_path), PICTURE)
    close(logits(loaded(target), PICTURE), expected)
    assert np.abs(logits(loaded(model), PICTURE) - expected).max() > 1


def test_all_other_tensors_and_files_keep_their_bytes(model, tmp_path):
    write_adapters(tmp_path / "adapters", model, lora_parameters={"keys": ["mlp.up_proj"]})
    target = fused(model, tmp_path)
    before, after = (open_safetensors(f / "model.safetensors") for f in (model, target))
    assert before.keys() == after.keys()
    moved = {name for name in before if before[name] != after[name]}
    assert moved == {name for name in before if name.endswith("mlp.up_proj.weight")}
    for name in ("pruners.safetensors", "config.json", "tokenizer.json"):
        assert (target / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize("name", ["minimind2-v", "minimind-3v"])
def test_experts_are_fused_one_by_one(tmp_path, name):
    model = converted(generations.release(name, True), tmp_path)
    write_adapters(tmp_path / "adapters", model)
    target, read = fused(model, tmp_path), image_of(model)
    close(logits(loaded(target), read), logits(adapted(model, tmp_path), read))


def image_of(folder):
    """A prompt for the sizes of the model in a folder."""
    model = loaded(folder)
    prompt = tiny.row("what is # ?")
    start, end = prompt.runs[0][0], sum(prompt.runs[0])
    ids = [*prompt.ids[:start], *[tiny.IMAGE] * model.N, *prompt.ids[end:]]
    side = model.config.vision.image_size
    return batch([type(prompt)(ids, [(start, model.N)])], 1, side)


@pytest.mark.parametrize("kind", backbones.KINDS)
def test_every_language_model_of_mlx_lms_is_fused(kind, tmp_path):
    model = backbones.write(kind, tmp_path / "hf")
    write_adapters(tmp_path / "adapters", model)
    target = fused(model, tmp_path)
    read = batch([llava.prompt(1)], 2, loaded(model).config.vision.image_size)
    close(logits(loaded(target), read), logits(adapted(model, tmp_path), read))
    convert(["to-hf", str(target), str(tmp_path / "back")])
    close(logits(loaded(tmp_path / "back"), read), logits(loaded(target), read))


def test_a_fused_model_converts_and_answers(model, tmp_path, capsys):
    write_adapters(tmp_path / "adapters", model)
    target, data = fused(model, tmp_path), write_data(tmp_path / "data")
    assert capsys.readouterr().out.endswith(f"Fused 21 adapters into {target}\n")
    generate_main(
        ["--model", str(target), "--image", str(data / "0.png"), "--prompt", "what is @ ?"]
    )
    convert(["to-torch", str(target), str(tmp_path / "fused.pth")])


def test_weights_stay_in_their_own_dtype(tmp_path):
    convert(["to-mlx", str(CHECKPOINT), str(tmp_path / "half"), "--dtype", "bfloat16"])
    write_adapters(tmp_path / "adapters", tmp_path / "half", num_layers=1)
    target = fused(tmp_path / "half", tmp_path)
    before, after = (
        open_safetensors(folder / "model.safetensors") for folder in (tmp_path / "half", target)
    )
    assert {n: x.dtype for n, x in before.items()} == {n: x.dtype for n, x in after.items()}
    expected = adapted(tmp_path / "half", tmp_path)
    for name, module in adapters(expected):
        exact = module.fuse().weight.astype(mx.bfloat16)
        stored = mx.load(str(target / "model.safetensors"))[f"{name}.weight"]
        assert bool(mx.array_equal(exact, stored))


MODES = [("affine", 4), ("affine", 3), ("affine", 8), ("mxfp4", None)]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The built-in model in a few bits."""
    folder = tmp_path_factory.mktemp("q")

    def make(mode: str, bits: int | None):
        target = folder / f"{mode}-{bits}"
        if not target.exists():
            options = [
                "--dtype",
                "float32",
                "--q-mode",
                mode,
                *(["--q-bits", str(bits)] if bits else []),
            ]
            convert(["to-mlx", str(CHECKPOINT), str(target), "-q", *options])
        return target

    return make


@pytest.mark.parametrize("stage", ["lora", "dora"])
@pytest.mark.parametrize(("mode", "bits"), MODES)
def test_a_quantized_base_is_quantized_again_and_says_so(
    quantized, tmp_path, capsys, mode, bits, stage
):
    base = quantized(mode, bits)
    write_adapters(tmp_path / "adapters", base, stage, num_layers=2)
    target = fused(base, tmp_path)
    text = capsys.readouterr().out
    assert "14 matrices were quantized again, which rounds by" in text
    assert "--dequantize rounds nothing off" in text
    one, two = (json.loads((f / "config.json").read_text()) for f in (base, target))
    settings = one["quantization"]
    assert one == two and settings["mode"] == mode
    stored, changed = mx.load(str(target / "model.safetensors")), 0
    for name, module in adapters(adapted(base, tmp_path)):
        exact = module.fuse(dequantize=True).weight
        for part, array in zip(("weight", "scales"), mx.quantize(exact, **settings), strict=False):
            assert bool(mx.array_equal(stored[f"{name}.{part}"], array)), name
        before = module.linear.weight
        changed += not mx.array_equal(stored[f"{name}.weight"], before)
    assert changed == 14
    base_tensors = open_safetensors(base / "model.safetensors")
    after = open_safetensors(target / "model.safetensors")
    same = {name for name in after if after[name] == base_tensors[name]}
    assert not {name for name in after if ".layers.0." in name or "tower" in name} - same


def test_the_rounding_that_is_said_is_the_one_that_was_done(quantized, tmp_path, capsys):
    base = quantized("affine", 4)
    write_adapters(tmp_path / "adapters", base, num_layers=1)
    target = fused(base, tmp_path)
    printed = float(capsys.readouterr().out.split("rounds by ")[1].split("%")[0]) / 100
    wanted, off = 0.0, 0.0
    full, plain = (read_full(folder) for folder in (target, base))
    for name, module in adapters(adapted(base, tmp_path)):
        exact = np.array(module.fuse(dequantize=True).weight)
        wanted += ((exact - plain[name]) ** 2).sum()
        off += ((full[name] - exact) ** 2).sum()
    assert printed == pytest.approx((off / wanted) ** 0.5, abs=0.005)
    assert 0 < printed < 0.5


def read_full(folder):
    """The full values of every quantized matrix."""
    arrays = mx.load(str(folder / "model.safetensors"))
    settings = read_checkpoint(folder).config["quantization"]
    names = {name.removesuffix(".scales") for name in arrays if name.endswith(".scales")}
    parts = ("weight", "scales", "biases")
    return {
        n: np.array(mx.dequantize(*(arrays[f"{n}.{p}"] for p in parts), **settings)) for n in names
    }


def test_what_quantizing_again_swallows_is_said(quantized, tmp_path, capsys):
    """As small as that, a change is rounded away; mlx-lm says nothing of it."""
    base = quantized("affine", 4)
    write_adapters(tmp_path / "adapters", base, num_layers=1, size=1e-6)
    fused(base, tmp_path)
    text = capsys.readouterr().out
    share = float(text.split("rounds by ")[1].split("%")[0])
    assert share > 50 or "came out as they were" in text


@pytest.mark.parametrize("stage", ["lora", "dora"])
def test_dequantized_nothing_is_rounded(quantized, tmp_path, stage):
    base = quantized("affine", 4)
    write_adapters(tmp_path / "adapters", base, stage)
    target = fused(base, tmp_path, "--dequantize")
    assert "quantization" not in json.loads((target / "config.json").read_text())
    read = image_of(base)
    close(logits(loaded(target), read), logits(adapted(base, tmp_path), read))


def test_what_cannot_be_fused_is_refused_in_one_sentence(model, tmp_path, capsys):
    write_adapters(tmp_path / "adapters", model)
    (tmp_path / "fused").mkdir()
    refusals = {
        "exists already": [],
        "is not quantized: there is nothing to dequantize": ["--save-path", "x", "--dequantize"],
        "there is no folder": ["--save-path", "x", "--adapter-path", "nowhere"],
    }
    for fault, options in refusals.items():
        places = [str(tmp_path / o) if o in ("x", "nowhere") else o for o in options]
        with pytest.raises(SystemExit) as stop:
            fused(model, tmp_path, *places)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and fault in error and error.count("\n") <= 2, error
    assert not (tmp_path / "x").exists()


def test_adapters_of_another_size_do_not_reach_the_weights(model, tmp_path, capsys):
    write_adapters(tmp_path / "adapters", None)
    with pytest.raises(SystemExit):
        fused(model, tmp_path)
    assert "do not fit this model" in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()
