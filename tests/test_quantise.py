"""Promises of -q: MLX's own values, the language model only, and mlx-lm's flags and config."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from convert.__main__ import main
from convert.quantise import quantised
from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.checkpoint import Checkpoint
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.quantization import MODES
from mlx_vlm_prune.checkpoints.reading.files import open_safetensors, write_safetensors
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor
from mlx_vlm_prune.inputs.prompt import Prompt
from mlx_vlm_prune.models.language.experts import GATHERED, ExpertLinear, Experts
from mlx_vlm_prune.pruners import plan

from . import generations
from .test_convert import refused
from .test_generations import converted

AFFINE = [("affine", bits) for bits in (2, 3, 4, 6, 8)]
OTHERS = [(mode, None) for mode in MODES if mode != "affine"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder with the built-in model, whose sizes groups of 64 fit, and what -q makes of it."""
    from mlx_vlm_prune.scenes import CHECKPOINT

    folder = tmp_path_factory.mktemp("scenes")

    def convert(*options: str):
        target = folder / "-".join(["q", *options]).replace("--", "")
        if not target.exists():
            main(["to-mlx", str(CHECKPOINT), str(target), "-q", *options])
        return target

    convert.source = CHECKPOINT
    return convert


def options(mode: str, bits: int | None) -> list[str]:
    return ["--q-mode", mode, *(["--q-bits", str(bits)] if bits else [])]


@pytest.mark.parametrize(("mode", "bits"), AFFINE + OTHERS)
def test_every_matrix_of_the_language_model_is_what_mlx_makes_of_it(scenes, mode, bits, capsys):
    target = scenes(*options(mode, bits))
    how = json.loads((target / "config.json").read_text())["quantization"]
    assert how["mode"] == mode and how["bits"] == (bits or MODES[mode][0][0])
    before = mx.load(str(scenes.source / "model.safetensors"))
    after = mx.load(str(target / "model.safetensors"))
    for name, array in before.items():
        if name.startswith("language.") and array.ndim == 2:
            prefix = name.removesuffix("weight")
            expected = mx.quantize(array, **how)
            parts = [after[prefix + x] for x in ("weight", "scales", "biases")[: len(expected)]]
            assert all(mx.array_equal(a, b).item() for a, b in zip(parts, expected, strict=True))
        else:
            assert mx.array_equal(array, after[name], equal_nan=True).item(), name


def test_the_pages_of_a_matrix_are_given_back_once_it_is_packed(scenes, tmp_path, monkeypatch):
    """Or else the source, however large, would fill memory page by page."""
    given = []
    monkeypatch.setattr(
        "mlx_vlm_prune.checkpoints.reading.tensors.free_pages",
        lambda mapped: given.append(mapped.nbytes),
    )
    main(["to-mlx", str(scenes.source), str(tmp_path / "made"), "-q"])
    held = open_safetensors(scenes.source / "model.safetensors")
    matrices = [t.nbytes for k, t in held.items() if k.startswith("language.layers.")]
    assert sum(given) >= sum(matrices) > 10**6


@pytest.mark.parametrize(("mode", "bits"), AFFINE + OTHERS)
def test_it_loads_and_computes_as_the_rounded_matrices_do(scenes, mode, bits, tmp_path, capsys):
    target = scenes(*options(mode, bits))
    main(["to-mlx", str(target), str(tmp_path / "whole"), "--dequantize", "--dtype", "float32"])
    assert "quantization" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    few, _ = load(target, dtype="float32")
    whole, _ = load(tmp_path / "whole", dtype="float32")
    assert isinstance(few.language.layers[0].mlp.up_proj, nn.QuantizedLinear)
    prompt = Prompt(list(range(3, 30)), [])
    a, b = (
        np.array(m([prompt], None, plan("none", {}), m.N, last_only=False).logits_BLV)
        for m in (few, whole)
    )
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * abs(b).max())


def test_learned_pruners_come_along_and_nothing_is_said_to_be_assumed(scenes, tmp_path, capsys):
    main(["to-mlx", str(scenes.source), str(tmp_path / "m"), "-q", "--q-bits", "8"])
    assert "assumed" not in capsys.readouterr().out
    learned = (tmp_path / "m" / "pruners.safetensors").read_bytes()
    assert learned == (scenes.source / "pruners.safetensors").read_bytes()
    model, _ = load(tmp_path / "m")
    assert set(model.learned) == {"attention_pool", "mlp", "score_prune", "twig"}


def test_config_and_sizes_are_those_that_mlx_lm_users_know(scenes, capsys):
    target = scenes("--q-bits", "4", "--q-group-size", "32")
    config = json.loads((target / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"] == {"bits": 4, "group_size": 32, "mode": "affine"}
    main(["inspect", str(target)])
    printed = capsys.readouterr().out
    assert "4 bits, groups of 32, affine, the language model" in printed
    sizes = [sum(t.nbytes for t in open_safetensors(f / "model.safetensors").values())
             for f in (scenes.source, target)]  # fmt: skip
    assert sizes[1] < 0.75 * sizes[0]


@pytest.mark.parametrize("name", ["minimind2-v", "minimind-3v"])
def test_a_mixture_of_experts_is_quantized_expert_by_expert(tmp_path, name, capsys, monkeypatch):
    """Its router stays whole; few rows and many give the same."""
    monkeypatch.setattr(generations, "D", 64)
    monkeypatch.setattr(generations, "d", 8)
    target = converted(generations.release(name, True), tmp_path, generations.torch.float32,
                       "-q", "--q-bits", "8")  # fmt: skip
    tensors = open_safetensors(target / "model.safetensors")
    assert "language.layers.0.mlp.experts.3.up_proj.scales" in tensors
    assert "language.layers.0.mlp.gate.scales" not in tensors
    few, _ = load(target, dtype="float32")
    main(["to-mlx", str(target), str(tmp_path / "whole"), "--dequantize"])
    whole, _ = load(tmp_path / "whole", dtype="float32")
    for rows in (4, 40):
        prompt = Prompt([3 + i % 30 for i in range(rows)], [])
        a, b = (
            np.array(m([prompt], None, plan("none", {}), m.N, last_only=False).logits_BLV)
            for m in (few, whole)
        )
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * abs(b).max())


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("device", [mx.cpu, mx.gpu])
def test_few_rows_and_many_take_different_ways_to_the_same_answer(device, quantized, monkeypatch):
    """On a GPU many rows are sorted by expert, and none is read on the host."""
    experts = Experts(4, 32, 64)
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer: ExpertLinear = experts[name]
        layer.weight = mx.random.normal(layer.weight.shape)
    rows = 3 * GATHERED
    x_RD, chosen = mx.random.normal((rows, 32)), mx.array([i * 7 % 4 for i in range(rows)])
    if quantized:
        nn.quantize(experts, group_size=32, bits=8)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    call = experts if device == mx.cpu else mx.compile(experts)
    many = call(x_RD, chosen)
    few = mx.concatenate([experts(x_RD[i : i + 1], chosen[i : i + 1]) for i in range(rows)])
    largest = np.abs(np.array(few)).max()
    np.testing.assert_allclose(np.array(many), np.array(few), rtol=1e-4, atol=1e-5 * largest)


def test_quantizing_twice_or_undoing_nothing_is_refused(scenes, tmp_path, capsys):
    target = scenes("--q-bits", "4")
    assert "quantized already" in refused(capsys, "to-mlx", target, tmp_path / "x", "-q")
    source = scenes.source
    assert "not quantized" in refused(capsys, "to-mlx", source, tmp_path / "x", "--dequantize")
    assert "dequantize it by to-mlx first" in refused(
        capsys, "to-torch", target, tmp_path / "x.pth"
    )
    assert "dequantize it by to-mlx first" in refused(capsys, "to-hf", target, tmp_path / "x")
    assert "--q-bits has no effect without -q; add -q" in refused(
        capsys, "to-mlx", source, tmp_path / "x", "--q-bits", "4"
    )
    assert "--q-group-size and --q-mode have no effect without -q" in refused(
        capsys, "to-mlx", source, tmp_path / "x", "--q-group-size", "64", "--q-mode", "mxfp4"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--q-mode", "mxfp4", "--q-bits", "8"], "mxfp4 has bits 4, not 8"),
        (["--q-mode", "nvfp4", "--q-group-size", "64"], "nvfp4 has group_size 16, not 64"),
        (["--q-group-size", "16"], "affine has group_size 64 or 32 or 128, not 16"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(scenes, tmp_path, capsys, argv, part):
    assert part in refused(capsys, "to-mlx", scenes.source, tmp_path / "x", "-q", *argv)


@pytest.mark.parametrize(("rows", "columns"), [(7, 16), (8, 16), (7, 32), (5, 48)])
def test_a_matrix_that_mlx_cannot_pack_is_refused_by_name_and_any_other_is_packed(rows, columns):
    """In nvfp4, which takes 32 numbers at a time."""
    weight = np.arange(rows * columns, dtype=np.float32)
    tensor = RawTensor("F32", (rows, columns), weight.view(np.uint8))
    checkpoint = Checkpoint({}, {"language.lm_head.weight": tensor}, Path(), None)
    if rows * columns % 32:
        with pytest.raises(UserError, match=f"lm_head.weight is {rows} x {columns}: nvfp4 needs"):
            quantised(checkpoint, mode="nvfp4")
        with pytest.raises(ValueError, match="reshape"):  # or it could be allowed
            mx.quantize(mx.array(weight).reshape(rows, columns), 16, 4, "nvfp4")
    else:
        packed = quantised(checkpoint, mode="nvfp4").tensors["language.lm_head.weight"]
        assert len(packed.data) == rows * columns // 2


def test_the_dtype_is_that_of_the_scales(scenes, capsys):
    target = scenes("--dtype", "bfloat16")
    kinds = {t.dtype for t in open_safetensors(target / "model.safetensors").values()}
    assert kinds == {"U32", "BF16"}


@pytest.mark.parametrize(
    "how", [3, {"bits": 4}, {"bits": 7, "group_size": 64}, {"bits": 4, "group_size": 64, "x": 1}]
)
def test_a_quantization_that_cannot_be_is_refused_by_load(scenes, tmp_path, how, capsys):
    import shutil

    shutil.copytree(scenes("--q-bits", "4"), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization": how}))
    with pytest.raises(UserError):
        load(tmp_path / "m")


def test_packed_words_where_none_belong_are_refused(scenes, tmp_path, capsys):
    import shutil

    file = scenes("--q-bits", "4") / "model.safetensors"
    shutil.copytree(file.parent, tmp_path / "m")
    held = open_safetensors(file)
    bits = held["projector.weight"]
    held["projector.weight"] = RawTensor("U8", (len(bits.data),), bits.data)
    write_safetensors(tmp_path / "m" / "model.safetensors", held, "mlx")
    with pytest.raises(UserError, match=r"projector\.weight"):
        load(tmp_path / "m")


def test_parameters_that_are_not_the_language_models_stay_whole(scenes, capsys):
    model, _ = load(scenes("--q-bits", "4"))
    for name, array in tree_flatten(model.parameters()):
        assert name.startswith("language.") or array.dtype == mx.float32, name
