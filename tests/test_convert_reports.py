"""Promises of what a conversion keeps and says: order of keys, sizes, all that is missing, JSON."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx import nn

from convert.__main__ import main
from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.minimind.generations import GENERATIONS
from mlx_vlm_prune.checkpoints.minimind.published import TOKENIZER_FOLDERS, usual_keys
from mlx_vlm_prune.checkpoints.names.ranges import list_names
from mlx_vlm_prune.checkpoints.names.rules import published_order
from mlx_vlm_prune.checkpoints.reading.files import open_safetensors
from mlx_vlm_prune.inputs.prompt import Prompt
from mlx_vlm_prune.pruners import plan
from mlx_vlm_prune.scenes import CHECKPOINT, HELD_OUT_SEEDS, question_set
from mlx_vlm_prune.training.learner import _unfreeze_tower

from .test_convert import published, refused, to_mlx  # noqa: F401 - a fixture

SORTED, REVERSED, ONCE = "sorted", "reversed", "without the output layer"


@pytest.mark.parametrize("order", [SORTED, REVERSED, ONCE])
def test_a_pth_comes_back_with_its_keys_in_their_order(published, order, capsys):  # noqa: F811
    state = torch.load(published / "published.pth", weights_only=True)
    keys = {SORTED: sorted(state), REVERSED: [*state][::-1], ONCE: [*state]}[order]
    if order == ONCE:
        keys.remove("lm_head.weight")
    torch.save({key: state[key] for key in keys}, published / "published.pth")
    target = to_mlx(published)
    main(["to-torch", str(target), str(published / "again.pth")])
    again = torch.load(published / "again.pth", weights_only=True)
    assert [*again] == keys
    assert all(again[key].equal(state[key]) for key in keys)
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed == f"{published / 'again.pth'}: every tensor of {target}, byte for byte"
    load(target)


def test_the_usual_order_is_not_written_down(published):  # noqa: F811
    state = torch.load(published / "published.pth", weights_only=True)
    generation = GENERATIONS["minimind2-v"]
    usual = usual_keys(published_order(generation.table, {*state} - {"lm_head.weight"}), generation)
    torch.save({key: state[key] for key in usual}, published / "published.pth")
    target = to_mlx(published)
    assert "published_keys" not in json.loads((target / "config.json").read_text())


@pytest.mark.parametrize("keys", ["lm_head.weight", [1], {"a": 1}, 3])
def test_keys_that_are_no_list_of_names_are_refused(published, keys, capsys):  # noqa: F811
    target = to_mlx(published)
    config = json.loads((target / "config.json").read_text()) | {"published_keys": keys}
    (target / "config.json").write_text(json.dumps(config))
    sentence = refused(capsys, "to-torch", target, published / "again.pth")
    assert "published_keys is not a list of names" in sentence
    assert not (published / "again.pth").exists()


def test_names_that_are_not_there_are_passed_over_and_new_ones_come_last(published):  # noqa: F811
    target = to_mlx(published)
    keys = ["../x", "model.norm.weight", "model.norm.weight"]
    config = json.loads((target / "config.json").read_text()) | {"published_keys": keys}
    (target / "config.json").write_text(json.dumps(config))
    main(["to-torch", str(target), str(published / "again.pth")])
    again = torch.load(published / "again.pth", weights_only=True)
    state = torch.load(published / "published.pth", weights_only=True)
    assert next(iter(again)) == "model.norm.weight" and {*again} == {*state} - {"lm_head.weight"}


# --- in few bits ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The built-in model in 8 bits, its tower too."""
    target = tmp_path_factory.mktemp("packed") / "model"
    main(["to-mlx", str(CHECKPOINT), str(target), "-q", "--q-bits", "8", "--q-tower"])
    return target


def test_quantizing_says_what_stays_and_how_the_tower_is_quantized_too(tmp_path, capsys):
    main(["to-mlx", str(CHECKPOINT), str(tmp_path / "a"), "-q"])
    line = capsys.readouterr().out.splitlines()[-1]
    tensors = open_safetensors(tmp_path / "a" / "model.safetensors")
    size = sum(t.nbytes for t in tensors.values()) / 1e6
    tower = sum(t.nbytes for name, t in tensors.items() if name.startswith("tower.")) / 1e6
    rest = (
        tower
        + sum(
            t.nbytes
            for name, t in tensors.items()
            if not name.startswith("tower.") and f"{name.rpartition('.')[0]}.scales" not in tensors
        )
        / 1e6
    )
    assert line == (
        f"the language model is in 4 bits; {rest:.1f} of {size:.1f} MB stay as they are,"
        f" {tower:.1f} MB of them the tower (--q-tower quantizes it, too)"
    )
    assert rest > 0.5 * size  # which is why it is said


def test_the_tower_is_packed_as_mlx_packs_it_and_everything_else_stays(packed, capsys):
    before = mx.load(str(CHECKPOINT / "model.safetensors"))
    after = mx.load(str(packed / "model.safetensors"))
    layers = [name for name in before if name.startswith("tower.encoder.layers.")]
    matrices = [name for name in layers if before[name].ndim == 2]
    assert matrices
    for name in matrices:
        parts = mx.quantize(before[name], bits=8, group_size=64)
        prefix = name.removesuffix("weight")
        kept = [after[prefix + part] for part in ("weight", "scales", "biases")]
        assert all(mx.array_equal(a, b).item() for a, b in zip(parts, kept, strict=True))
    for name, array in before.items():
        if not name.startswith("language.") and name not in matrices:
            assert mx.array_equal(array, after[name]).item(), name
    config = json.loads((packed / "config.json").read_text())
    assert config["quantization"] == {"bits": 8, "group_size": 64, "mode": "affine", "tower": True}
    main(["inspect", str(packed)])
    printed = capsys.readouterr().out
    assert "8 bits, groups of 64, affine, the language model and the tower" in printed


def test_a_packed_tower_loads_answers_and_sees_what_the_full_one_sees(packed):
    few, processor = load(packed, dtype="float32")
    whole, _ = load(dtype="float32")
    assert isinstance(few.tower.encoder.layers[0].mlp.fc1, nn.QuantizedLinear)
    scene, (question, *_) = next(question_set(HELD_OUT_SEEDS, 1))
    image = scene.image()
    pixels = mx.array(processor.image(image)[None])
    a, b = (np.array(model.tower(pixels).signals.x_BND) for model in (few, whole))
    assert 0 < np.abs(a - b).max() < 0.05 * np.abs(b).max()
    answer = generate(few, processor, question.text, image, pruner="divprune", keep_ratio=0.5)
    assert answer.visual_tokens_kept == answer.visual_tokens // 2


def test_a_packed_tower_is_undone_and_does_not_learn(packed, tmp_path):
    main(["to-mlx", str(packed), str(tmp_path / "whole"), "--dequantize", "--dtype", "float32"])
    whole, _ = load(tmp_path / "whole")
    few, _ = load(packed, dtype="float32")
    prompt = Prompt(list(range(3, 20)), [])
    a, b = (m([prompt], None, plan("none", {}), m.N).logits_BV for m in (few, whole))
    np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-3, atol=1e-2)
    with pytest.raises(ValueError, match="the vision tower is quantized"):
        _unfreeze_tower(few)


def test_the_flag_for_the_tower_needs_q(tmp_path, capsys):
    sentence = refused(capsys, "to-mlx", CHECKPOINT, tmp_path / "x", "--q-tower")
    assert "--q-tower has no effect without -q; add -q" in sentence


# --- what is missing ------------------------------------------------------------------


def test_a_conversion_names_all_that_is_missing_at_once(published, capsys):  # noqa: F811
    alone = published / "alone"
    alone.mkdir()
    shutil.copy(published / "published.pth", alone)
    sentence = refused(capsys, "to-mlx", alone / "published.pth", published / "x")
    assert "--vision FOLDER" in sentence and "--tokenizer FOLDER" in sentence


def test_a_conversion_names_all_tensors_that_are_missing(published, capsys):  # noqa: F811
    state = torch.load(published / "published.pth", weights_only=True)
    gone = ("model.layers.1.input_layernorm.weight", "model.norm.weight")
    torch.save({k: v for k, v in state.items() if k not in gone}, published / "published.pth")
    words, clip = published / "words", published / "clip"
    sentence = refused(
        capsys, "to-mlx", published / "published.pth", published / "x", "--vision", clip,
        "--tokenizer", words,
    )  # fmt: skip
    names = "language.layers.1.input_layernorm.weight, language.norm.weight"
    assert sentence.endswith(f"lacks 2 tensors: {names}\n")


def test_names_that_differ_in_their_numbers_are_ranges():
    layers = [f"layers.{i}.{name}.weight" for i in (0, 1, 2, 7) for name in ("norm", "up")]
    assert list_names(["head.weight", *layers]) == (
        "head.weight, layers.0-2,7.norm.weight, layers.0-2,7.up.weight"
    )
    experts = [f"layers.{i}.mlp.experts.{j}.up.weight" for i in range(3) for j in range(8)]
    assert list_names(experts) == "layers.0-2.mlp.experts.0-7.up.weight"
    assert list_names([experts[0], experts[-1]]) == f"{experts[0]}, {experts[-1]}"
    assert list_names(["pruner.k_proj.weight", "conv1.weight"]) == (
        "pruner.k_proj.weight, conv1.weight"
    )


@pytest.mark.parametrize("place", TOKENIZER_FOLDERS)
def test_a_tokenizer_beside_the_pth_is_taken_as_clip_is(published, place):  # noqa: F811
    (published / place).parent.mkdir(exist_ok=True)
    shutil.move(published / "words", published / place)
    main(["to-mlx", str(published / "published.pth"), str(published / "mlx")])
    load(published / "mlx")


def test_options_and_the_target_are_checked_before_anything_is_read(tmp_path, capsys):
    sentence = refused(capsys, "to-mlx", CHECKPOINT, tmp_path)
    assert "exists already" in sentence
    missing = tmp_path / "none.pth"
    (missing).write_bytes(b"")
    sentence = refused(capsys, "to-mlx", missing, tmp_path / "x", "--twig-layer", "2")
    assert "belong together" in sentence


# --- inspect --json -------------------------------------------------------------------


def test_inspect_prints_json_that_says_what_the_text_says(published, capsys):  # noqa: F811
    (published / "words").rename(published / "tokenizer")
    main(["inspect", str(published / "published.pth"), "--json"])
    about = json.loads(capsys.readouterr().out)
    assert about["path"] == str(published / "published.pth")
    assert about["missing"] == [] and "tokenizer" not in about
    state = torch.load(published / "published.pth", weights_only=True)
    assert about["tensors"] == {
        "count": len(state), "bytes": sum(t.nbytes for t in state.values()), "dtypes": ["F16"],
    }  # fmt: skip
    main(["inspect", str(published / "published.pth")])
    text = capsys.readouterr().out
    assert about["published_as"] in text and about["language_model"] in text
    assert "missing         nothing" in text
