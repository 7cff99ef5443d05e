"""Promises about every generation of MiniMind-V: known by its tensors, computed right, both ways.

The oracles are transformers' classes and, where it has none, the loops in generations.py.
"""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.__main__ import main
from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.families import read_checkpoint
from mlx_vlm_prune.checkpoints.names.value_order import CONVOLUTION, INTERLEAVED, PATCHES
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor
from mlx_vlm_prune.inputs.prompt import Prompt
from mlx_vlm_prune.pruners import METHODS, Stage, plan
from torch_ref.models.loading import load_pth
from torch_ref.pruners import Step

from . import generations
from .generations import CASES, NAMES, SIDE
from .test_model import CHOOSING

# A release brings no weights of learned methods.
UNTAUGHT = [name for name in CHOOSING if not METHODS[name].learned]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def converted(release, folder, dtype=torch.float32, *more):
    """The release, written and converted to FOLDER/mlx."""
    release.write(folder, dtype)
    argv = ["to-mlx", folder / "published.pth", folder / "mlx", "--vision", folder / "tower"]
    main([str(a) for a in [*argv, "--tokenizer", folder / "words", *more]])
    return folder / "mlx"


@pytest.fixture(params=range(len(CASES)), ids=NAMES)
def release(request):
    return generations.release(*CASES[request.param])


def image_prompt(release, model) -> Prompt:
    """Words, the image, words."""
    ids = [5, 9, 20]
    return Prompt(
        [*ids, *[model.config.image_token_id] * release.N, 7, 11, 30], [(len(ids), release.N)]
    )


def test_logits_equal_those_of_the_oracle_and_of_the_reference(release, tmp_path, capsys):
    model, _ = load(converted(release, tmp_path))
    prompt = image_prompt(release, model)
    pixels_13HW = torch.randn(1, 3, SIDE, SIDE)
    expected_LV = release.logits(prompt.ids, prompt.runs[0][0], pixels_13HW).numpy()
    pixels = mx.array(pixels_13HW.permute(0, 2, 3, 1).numpy())
    ours = model([prompt], pixels, plan("none", {}), release.N, last_only=False).logits_BLV
    tower = tmp_path / "tower"
    other = load_pth(tmp_path / "published.pth", tower, torch.device("cpu"))
    with torch.no_grad():
        theirs = other.logits([prompt], pixels_13HW)
    largest = np.abs(expected_LV).max()
    assert largest > 0.5
    np.testing.assert_allclose(np.array(ours)[0], expected_LV, rtol=1e-4, atol=1e-5 * largest)
    np.testing.assert_allclose(theirs[0].numpy(), expected_LV, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_to_mlx_and_back_gives_the_same_bytes(release, tmp_path, dtype, capsys):
    target = converted(release, tmp_path, DTYPES[dtype])
    again, tower = tmp_path / "again.pth", tmp_path / "tower-again"
    main(["to-torch", str(target), str(again), "--vision", str(tower)])
    before, after = (torch.load(p, weights_only=True) for p in (tmp_path / "published.pth", again))
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype and before[name].shape == after[name].shape
        assert before[name].view(torch.uint8).equal(after[name].view(torch.uint8)), name
    was, now = (load_file(f / "model.safetensors") for f in (tmp_path / "tower", tower))
    assert set(was) - set(now) == {name for name in was if ".head." in name}
    for name in now:
        assert now[name].dtype == was[name].dtype and now[name].equal(was[name]), name


def test_converting_twice_equals_converting_once(release, tmp_path, capsys):
    target = converted(release, tmp_path)
    main(["to-mlx", str(target), str(tmp_path / "twice")])
    for name in ("model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (target / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_it_is_recognised_by_its_tensors_and_inspect_names_it(release, tmp_path, capsys):
    target = converted(release, tmp_path)
    assert json.loads((target / "config.json").read_text())["published_as"] == release.name
    capsys.readouterr()
    main(["inspect", str(tmp_path / "published.pth"), "--vision", str(tmp_path / "tower")])
    printed = capsys.readouterr().out
    assert f"({release.name})" in printed and "missing         nothing" in printed
    heads = "read off the norm of keys" if release.third else "assumed"
    assert f"8, and 2 for keys and values ({heads}" in printed
    assert ("of 4 a token" in printed) == release.moe
    main(["inspect", str(target)])
    assert "missing         nothing" in capsys.readouterr().out


def test_it_answers_pruned(release, tmp_path, capsys):
    from PIL import Image

    model, processor = load(converted(release, tmp_path))
    picture = Image.fromarray(np.random.randint(0, 255, (80, 96, 3), np.uint8))
    full = generate(model, processor, "where is the star", image=picture, max_tokens=4)
    half = generate(
        model, processor, "where is the star", image=picture, max_tokens=4,
        pruner="received_attention", keep_ratio=0.5,
    )  # fmt: skip
    assert full.visual_tokens == release.N and half.visual_tokens_kept == release.N // 2


def test_what_its_files_do_not_say_can_come_from_its_own_resume_file(tmp_path, capsys):
    """{model, optimizer, …} in float32, the tower inside under vision_encoder."""
    release = generations.release("minimind-3v", False)
    target = converted(release, tmp_path)
    inside = {f"vision_encoder.{k}": v for k, v in release.tower.items()}
    held = {"model": release.text | inside, "optimizer": {"state": {}}, "epoch": 1, "step": 7}
    torch.save(held, tmp_path / "resume.pth")
    words = str(tmp_path / "words")
    main(["to-mlx", str(tmp_path / "resume.pth"), str(tmp_path / "b"), "--tokenizer", words])
    assert (target / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()


def test_the_language_model_alone_is_read_by_transformers(release, tmp_path, capsys):
    import transformers

    target = converted(release, tmp_path)
    argv = ["to-hf", str(target), str(tmp_path / "hf")]
    if release.moe and not release.third:
        with pytest.raises(SystemExit):
            main(argv)
        assert "transformers has no class" in capsys.readouterr().err
        assert not (tmp_path / "hf").exists()
        return
    main(argv)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    ids = torch.arange(12)[None]
    ours, _ = load(target)
    prompt = Prompt(ids[0].tolist(), [])
    logits_BLV = ours([prompt], None, plan("none", {}), release.N, last_only=False).logits_BLV
    with torch.no_grad():
        expected = model.eval()(ids).logits.numpy()
    np.testing.assert_allclose(
        np.array(logits_BLV), expected, rtol=1e-4, atol=1e-5 * abs(expected).max()
    )


@pytest.fixture(scope="module", params=["minimind-3v", "minimind-3v-2026-04-19"])
def third(request, tmp_path_factory):
    """Without CLS, with q/k norm and experts; of the second four patches make a token."""
    folder = tmp_path_factory.mktemp("third")
    release = generations.release(request.param, True, seed=5)
    model, _ = load(converted(release, folder))
    path = folder / "published.pth"
    reference = load_pth(path, folder / "tower", torch.device("cpu"))
    return release, model, reference


@pytest.mark.parametrize("spec", [*UNTAUGHT, "tome+divprune", "cls_attention+restore"])
def test_every_method_works_without_cls_as_the_reference_does(third, spec):
    release, model, reference = third
    prompt, K = image_prompt(release, model), release.N // 2 + 1
    pixels_13HW = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    pixels = mx.array(pixels_13HW.permute(0, 2, 3, 1).numpy())
    pipeline = plan(spec, {})
    steps = [
        Step(step.name, k, step.options) for step, k in pipeline.budgets(release.N, K).per_step
    ]
    steps += [Step(step.name, None, step.options) for step in pipeline.enhancers]
    within = any(
        step.stage is Stage.ENCODER and k < release.N
        for step, k in pipeline.budgets(release.N, K).per_step
    )
    if within and release.N < (SIDE // generations.PATCH) ** 2:
        with pytest.raises(UserError, match="neighbouring patches become one visual token"):
            model([prompt], pixels, pipeline, K)
        return
    try:
        before = model([prompt], pixels, pipeline, K, "keep", last_only=False)
    except UserError as e:  # few layers cannot average few tokens
        assert pipeline.decoder and "average" in str(e)
        return
    with torch.no_grad():
        expected = reference.logits([prompt], pixels_13HW, steps, positions="keep")[0].numpy()
    ours = np.array(before.logits_BLV)[0]
    np.testing.assert_allclose(
        ours[-len(expected) :], expected, rtol=1e-4, atol=1e-5 * abs(expected).max()
    )


def tensor(values, *shape) -> RawTensor:
    return RawTensor("F16", shape, np.array(values, np.float16).view(np.uint8))


def numbers(raw: RawTensor) -> list[int]:
    return raw.data.view(np.float16).astype(int).tolist()


def test_the_axes_of_a_convolution_worked_by_hand():
    # one output, two inputs, 1 x 2 pixels: (o, i, h, w) holds i0w0 i0w1 i1w0 i1w1
    published = tensor([1, 2, 3, 4], 1, 2, 1, 2)
    ours = CONVOLUTION.to_ours(published, 1)
    assert ours.shape == (1, 1, 2, 2) and numbers(ours) == [1, 3, 2, 4]
    assert CONVOLUTION.to_published(ours, 1) == published


def test_the_rows_of_an_interleaved_rotation_worked_by_hand():
    # two heads of four rows: neighbours 0 1 | 2 3 become partners two apart
    published = tensor([10, 11, 12, 13, 20, 21, 22, 23], 8, 1)
    ours = INTERLEAVED.to_ours(published, 4)
    assert numbers(ours) == [10, 12, 11, 13, 20, 22, 21, 23]
    assert INTERLEAVED.to_published(ours, 4) == published
    six = INTERLEAVED.to_ours(tensor([0, 1, 2, 3, 4, 5], 6, 1), 6)
    assert numbers(six) == [0, 2, 4, 1, 3, 5]


def test_flat_patches_worked_by_hand():
    # 2 x 2 pixels of three colours, pixel by pixel: red, green and blue lie innermost
    published = tensor(range(12), 1, 12)
    ours = PATCHES.to_ours(published, 1)
    assert ours.shape == (1, 2, 2, 3) and numbers(ours) == list(range(12))
    assert PATCHES.to_published(ours, 1) == published


def test_a_conversion_that_forgets_the_rotation_gives_other_answers(tmp_path, capsys, monkeypatch):
    """The check can fail: without the permutation of queries and keys the logits differ."""
    from mlx_vlm_prune.checkpoints.names import value_order

    release = generations.release("minimind2-v-2025-02", False)
    monkeypatch.setattr(value_order, "_evens_first", lambda head_dim: list(range(head_dim)))
    with pytest.raises(AssertionError, match="Not equal"):
        test_logits_equal_those_of_the_oracle_and_of_the_reference(release, tmp_path, capsys)


REFUSED = {
    "v1 of 2024": (
        "minimind2-v-2025-02",
        lambda s: s.update({"layers.0.attention.wk.weight": torch.ones(24, 48)}),
        "minimind-v-v1 of 2024, which is not supported: it reads 50 tokens",
    ),
    "language model alone": (
        "minimind-3v",
        lambda s: [s.pop(k) for k in list(s) if k.startswith("vision_proj")],
        "MiniMind-3's language model alone, without vision_proj",
    ),
    "a scorer": (
        "minimind2-v",
        lambda s: s.update({"vision_proj.scorer.0.weight": torch.ones(1, 32)}),
        "its layout was never published",
    ),
    "two families": (
        "minimind2-v",
        lambda s: s.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(12)}),
        "mixes MiniMind-3's language model with MiniMind2-V's projector",
    ),
    "another model": (
        "minimind2-v",
        lambda s: [s.pop(k) for k in list(s) if "embed_tokens" in k],
        "holds no language model of MiniMind-V",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_supported_is_named_with_a_reason(kind, tmp_path):
    name, change, sentence = REFUSED[kind]
    release = generations.release(name, False)
    change(release.text)
    release.text.setdefault("lm_head.weight", torch.ones(1))
    release.write(tmp_path)
    with pytest.raises(UserError, match=sentence):
        read_checkpoint(tmp_path / "published.pth", tmp_path / "tower", tmp_path / "words")


def test_a_folder_of_transformers_says_how_many_heads(tmp_path, capsys):
    """MiniMind2-V as on the hub: custom code, config.json, pytorch_model.bin, no tower."""
    release = generations.release("minimind2-v", False)
    release.write(tmp_path)
    folder = tmp_path / "hub"
    folder.mkdir()
    (tmp_path / "published.pth").rename(folder / "pytorch_model.bin")
    config = {"model_type": "minimind-v", "num_attention_heads": 4, "num_key_value_heads": 1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model_minimind.py").write_text("raise SystemExit('executed')")
    source = read_checkpoint(folder, tmp_path / "tower", tmp_path / "words")
    text = source.config["text_config"]
    assert (text["num_attention_heads"], text["num_key_value_heads"]) == (4, 1)
    main(["inspect", str(folder), "--vision", str(tmp_path / "tower")])
    assert "4, and 1 for keys and values (from config.json)" in capsys.readouterr().out


def test_a_tower_whole_with_its_other_half_and_in_shards_gives_the_same(tmp_path, capsys):
    release = generations.release("minimind-3v", False)
    target = converted(release, tmp_path)
    tower = tmp_path / "tower"
    held = load_file(tower / "model.safetensors")
    held["text_model.embeddings.token_embedding.weight"] = torch.ones(4, 4)
    held["logit_scale"], held["logit_bias"] = torch.ones(1), torch.ones(1)
    (tower / "model.safetensors").unlink()
    parts = {"model-00001-of-00002.safetensors": sorted(held)[::2]}
    parts["model-00002-of-00002.safetensors"] = sorted(held)[1::2]
    for part, names in parts.items():
        save_file({name: held[name].contiguous() for name in names}, tower / part)
    index = {"weight_map": {name: part for part, names in parts.items() for name in names}}
    (tower / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "siglip", "vision_config": release.tower_config}
    (tower / "config.json").write_text(json.dumps(config))
    argv = ["to-mlx", tmp_path / "published.pth", tmp_path / "b", "--vision", tower]
    main([str(a) for a in [*argv, "--tokenizer", tmp_path / "words"]])
    assert (target / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
