"""Promises about folders of LLaVAs whose language model is mlx-lm's: converted, read, inspected."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration as Llava

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from convert.__main__ import main
from mlx_vlm_prune import generate, load
from mlx_vlm_prune.models.language.mlx_lm import MlxLm
from mlx_vlm_prune.pruners import plan
from torch_ref.models.loading import load_llava

from . import backbones, llava
from .backbones import KINDS, SCANS, theirs
from .llava import N
from .pruner_cases import close
from .test_llava import as_mx, ours, pixels
from .test_model import K

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return backbones.loader(tmp_path_factory.mktemp)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_gives_the_same_bytes_under_the_same_names(kind, models, tmp_path, capsys):
    folder = models(kind).folder
    main(["to-mlx", str(folder), str(tmp_path / "mlx")])
    main(["to-hf", str(tmp_path / "mlx"), str(tmp_path / "hf")])
    was, now = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "hf"))
    was = {k: v for k, v in was.items() if ".head." not in k}  # SigLIP's, which no LLaVA reads
    assert was.keys() == now.keys()
    for name in was:
        assert was[name].shape == now[name].shape
        assert was[name].view(torch.uint8).equal(now[name].view(torch.uint8)), name
    config, again = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "hf"))
    assert config == again


@pytest.mark.parametrize("layout", llava.RENAMED)
@pytest.mark.parametrize("kind", ["phi", *SCANS])
def test_every_releases_names_are_read(kind, layout, models, tmp_path):
    folder = backbones.write(kind, tmp_path / "hf", layout=layout)
    model, _ = load(folder, dtype="float32")
    prompt, pixel_values = llava.prompt(), pixels()
    np.testing.assert_array_equal(
        ours(model, prompt, pixel_values), ours(models(kind).ours, prompt, pixel_values)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_a_converted_and_a_quantized_one_answer_pruned(kind, models, tmp_path, capsys):
    picture = Image.fromarray(np.random.randint(0, 255, (80, 96, 3), np.uint8))
    main(["to-mlx", str(models(kind).folder), str(tmp_path / "mlx")])
    options = ["-q", "--q-group-size", "32"]
    main(["to-mlx", str(models(kind).folder), str(tmp_path / "few"), *options])
    answers = []
    for place in (models(kind).folder, tmp_path / "mlx", tmp_path / "few"):
        model, processor = load(place)
        answer = generate(
            model, processor, "where is the star ?", image=picture, max_tokens=4,
            pruner="visionzip+v2drop", keep_ratio=0.5,
        )  # fmt: skip
        assert answer.visual_tokens == N and answer.visual_tokens_kept == N // 2
        answers.append(answer.token_ids)
    assert answers[0] == answers[1]


def test_a_llama_3_in_the_layout_of_llavas_authors_is_mlx_lms_too(models, tmp_path, capsys):
    model = models("llama").theirs
    turns = {k: v for k, v in backbones.TURNS.items() if k != "rope_theta"}
    fields = {"head_dim": 24, "attention_bias": True, "mlp_bias": True, "rope_scaling": turns}
    folder = llava.write_original(model, tmp_path / "llava-v1.5", rope_theta=1e4, **fields)
    shutil.copytree(tmp_path / "clip", folder / "clip-vit-large-patch14-336")
    prompt, pixel_values = llava.prompt(2), pixels(2)
    expected = theirs(model, prompt, pixel_values)[:, : llava.WORDS]
    read_here, _ = load(folder, dtype="float32")
    assert isinstance(read_here.language, MlxLm)
    close(ours(read_here, prompt, pixel_values), expected)
    with torch.no_grad():
        close(load_llava(folder, CPU).logits([prompt], pixel_values)[0].numpy(), expected)
    main(["to-mlx", str(folder), str(tmp_path / "mlx"), "--vision", str(tmp_path / "clip")])
    main(["to-hf", str(tmp_path / "mlx"), str(tmp_path / "hf")])
    again = Llava.from_pretrained(tmp_path / "hf").eval()
    close(theirs(again, prompt, pixel_values), expected)


def test_an_output_layers_bias_counts(models, tmp_path):
    """Phi has one where transformers 4 saved the model, and none where version 5 did."""
    folder = shutil.copytree(models("phi").folder, tmp_path / "hf")
    state = load_file(folder / "model.safetensors")
    bias = torch.randn(len(state["language_model.lm_head.weight"]))
    save_file({**state, "language_model.lm_head.bias": bias}, folder / "model.safetensors")
    model, _ = load(folder, dtype="float32")
    prompt, pixel_values = llava.prompt(), pixels()
    close(
        ours(model, prompt, pixel_values),
        ours(models("phi").ours, prompt, pixel_values) + bias.numpy(),
    )


@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
@pytest.mark.parametrize("linear", [True, False])
def test_any_tower_goes_with_any_projector(tower, linear, models, tmp_path, capsys):
    """A folder of ours, put together of Phi, either tower, and one matrix or two."""
    source = models("phi" if tower == "clip_vision_model" else "qwen3").folder
    main(["to-mlx", str(source), str(tmp_path / "tower")])
    main(["to-mlx", str(models("phi").folder), str(tmp_path / "words")])
    config, words = (
        json.loads((tmp_path / place / "config.json").read_text()) for place in ("tower", "words")
    )
    state, language = (
        load_file(tmp_path / place / "model.safetensors") for place in ("tower", "words")
    )
    state = {k: v for k, v in state.items() if not k.startswith("language.")}
    state |= {k: v for k, v in language.items() if k.startswith("language.")}
    if linear:
        state = {k: v for k, v in state.items() if "projector.fc2" not in k}
        state = {k.replace("projector.fc1", "projector"): v for k, v in state.items()}
        config["projector"] = None
    config["text_config"] = words["text_config"]
    save_file(state, tmp_path / "words" / "model.safetensors", metadata={"format": "mlx"})
    reading = "preprocessor_config.json"
    shutil.copyfile(tmp_path / "tower" / reading, tmp_path / "words" / reading)
    (tmp_path / "words" / "config.json").write_text(json.dumps(config))
    model, _ = load(tmp_path / "words", dtype="float32")
    assert isinstance(model.language, MlxLm)
    prompt, pixel_values = llava.prompt(), as_mx(pixels())
    project, seen_BND = model.projector, model.tower(pixel_values).signals.x_BND
    x_BND = project(seen_BND)
    expected = seen_BND @ state_of(state, "projector.weight").T if linear else x_BND
    if linear:
        close(np.array(x_BND), np.array(expected + state_of(state, "projector.bias")))
    pruned = model([prompt], pixel_values, plan("norm+fastv"), K)
    assert pruned.trace.steps[-1].reductions[0].slots < N and mx.isfinite(pruned.logits_BLV).all()


def state_of(state, name: str) -> mx.array:
    return mx.array(state[name].numpy())


def test_inspect_says_who_computes_the_language_model(models, tmp_path, capsys):
    main(["to-mlx", str(models("phi").folder), str(tmp_path / "mlx")])
    capsys.readouterr()
    for place in (models("phi").folder, tmp_path / "mlx"):
        main(["inspect", str(place)])
        output = capsys.readouterr().out
        assert "3 layers of 64, Phi, computed by mlx-lm" in output
        assert "4, and 2 for keys and values (from config.json)" in output
        assert "missing         nothing" in output


def test_lightvlms_shape_is_576_patches_below_phi_2(tmp_path, capsys):
    """CLIP-L/336 and Phi-2 as trio are published, by headers: the data is a hole."""
    backbones.write_lightvlm(tmp_path)
    main(["inspect", str(tmp_path)])
    output = capsys.readouterr().out
    assert "32 layers of 2560, Phi, computed by mlx-lm" in output
    assert "CLIP, 24 layers of 1024, 24 x 24 patches of 14 pixels, features of layer 23" in output
    assert "two layers, 1024 to 2560" in output
    # Phi-2's 2,779,683,840 numbers, the tower's 303,507,456, the projector's 9,180,160
    assert "6184.7 MB, F16" in output
