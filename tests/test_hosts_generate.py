"""Promises of the main job with mlx-vlm's models: load, generate, the command line, refusals."""

import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune import generate, load, stream_generate
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generate import main
from mlx_vlm_prune.hosts.prepared_inputs import ProcessorOptions

from . import host_folders
from .test_generate import refused

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
QUESTION = "w7 w9"
QWEN = ["qwen2_5_vl", "qwen3_vl"]
FAMILIES = ["llava", *QWEN]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return host_folders.desk(tmp_path_factory.mktemp("hosts"), FAMILIES)


@pytest.fixture(scope="module")
def loaded(home):
    return {name: load(home / name) for name in FAMILIES}


def command(home, name: str, *more: str) -> list[str]:
    image = ["--image", str(home / "a.png"), "--image", str(home / "b.png")]
    return ["--model", str(home / name), "--prompt", QUESTION, "--max-tokens", "5", *image, *more]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_not_pruned_is_computed_and_timed_in_one_go_as_mlx_vlm_has_it(home, name, capsys):
    file = home / "none.json"
    main(command(home, name, "--json", str(file)))
    took = json.loads(file.read_text())["ttft_ms"]
    assert [*took] == ["image", "vision", "pruner", "prefill", "total"]
    assert (took["vision"], took["pruner"], took["prefill"]) == (None, 0, None)
    together = took["total"] - took["image"]
    assert together > 0
    assert f"vision and prefill {together:.1f})" in capsys.readouterr().out


@pytest.mark.parametrize("pruner", ["vispruner", "tome"])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_command_prunes_and_tells_every_figure(home, name, pruner, capsys):
    file, picture = home / "figures.json", home / "kept.png"
    budget = ["--pruner", pruner, "--keep-ratio", "0.25", "--prefill-step-size", "4"]
    main(command(home, name, *budget, "--json", str(file), "--overlay", str(picture)))
    shown, figures = capsys.readouterr(), json.loads(file.read_text())
    sizes = [16, 16] if name == "llava" else [9, 8]
    assert figures["visual_tokens"] == sum(sizes)
    assert [len(image) for image in figures["kept_indices"]] == [n // 4 for n in sizes]
    assert figures["visual_tokens_kept"] == sum(n // 4 for n in sizes)
    assert figures["positions"] == ("renumber" if name == "llava" else "keep")
    parts = sum(figures["ttft_ms"][part] for part in ("image", "vision", "pruner", "prefill"))
    assert parts == pytest.approx(figures["ttft_ms"]["total"]) and figures["ttft_ms"]["vision"] > 0
    assert figures["text"] in shown.out and "Visual tokens:" in shown.out
    assert "importing mlx-vlm" in shown.err
    rows = figures["prompt_tokens"]
    assert figures["cache_bytes"] == rows * 3 * 2 * 2 * 16 * 4  # layers, key and value, heads
    assert Image.open(picture).size[0] > 600


def test_the_words_and_the_kept_tokens_are_all_there_is_in_the_prompt(loaded, home):
    model, processor = loaded["llava"]
    both = [home / "a.png", home / "b.png"]
    full = generate(model, processor, QUESTION, image=both, max_tokens=1)
    kept = generate(
        model, processor, QUESTION, image=both, pruner="norm", keep_tokens=3, max_tokens=1
    )
    assert (full.prompt_tokens, kept.prompt_tokens) == (3 + 32, 3 + 6)


@pytest.mark.parametrize("pruner", ["none", "divprune", "fastv", "pyramiddrop"])
@pytest.mark.parametrize("name", QWEN)
def test_unpruned_it_answers_as_mlx_vlm_does(loaded, home, name, pruner):
    from mlx_vlm import apply_chat_template
    from mlx_vlm import generate as stock

    model, processor = loaded[name]
    images = [str(home / "a.png"), str(home / "b.png")]
    text = apply_chat_template(processor, model.config, QUESTION, num_images=2)
    theirs = stock(model, processor, text, image=images, max_tokens=6, temperature=0.0)
    ours = generate(
        model, processor, QUESTION, image=images, pruner=pruner, keep_ratio=1.0, max_tokens=6
    )
    assert (ours.text, ours.prompt_tokens) == (theirs.text, theirs.prompt_tokens)
    assert ours.token_ids == getattr(theirs, "token_ids", ours.token_ids)  # not told in 0.7.0


def test_llavas_picture_is_what_transformers_makes_of_it(loaded, home):
    from transformers import CLIPImageProcessor

    from mlx_vlm_prune.hosts.families import host_of

    host = host_of(*loaded["llava"])
    opened = Image.open(home / "a.png").convert("RGB")
    inputs = host.prepare("<image> w7", [opened], ProcessorOptions())
    theirs = CLIPImageProcessor.from_pretrained(home / "llava")(opened)["pixel_values"][0]
    np.testing.assert_allclose(np.array(inputs.pixels[0]), np.asarray(theirs), atol=1e-6)
    assert inputs.ids == [60] * 16 + [7]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stream_is_the_answer_in_pieces(loaded, home, name):
    model, processor = loaded[name]
    options = dict(image=home / "a.png", pruner="norm", keep_tokens=4, max_tokens=7)
    pieces = list(stream_generate(model, processor, QUESTION, **options))
    whole = generate(model, processor, QUESTION, **options)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert whole.text.split() == processor.tokenizer.decode(whole.token_ids).split()
    assert [piece.generation_tokens for piece in pieces] == list(range(1, len(pieces) + 1))
    assert [piece.finish_reason for piece in pieces] == [None] * 6 + ["length"]
    assert len(pieces) == len(whole.token_ids) == 7


def test_an_answer_ends_at_the_token_that_ends_it(loaded, home, monkeypatch):
    model, processor = loaded["llava"]
    options = dict(image=home / "a.png", pruner="norm", keep_tokens=4, max_tokens=7)
    first, second, *_ = generate(model, processor, QUESTION, **options).token_ids
    assert first != second
    monkeypatch.setattr(processor.tokenizer.stopping_criteria, "eos_token_ids", [second])
    answer = generate(model, processor, QUESTION, **options)
    assert (answer.token_ids, answer.generation_tokens) == ([first], 2)
    assert answer.finish_reason == "stop"


def test_text_alone_is_answered_too(loaded):
    for model, processor in loaded.values():
        answer = generate(model, processor, QUESTION, max_tokens=3)
        assert (answer.prompt_tokens, answer.visual_tokens, len(answer.token_ids)) == (3, 0, 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_left_on_the_instance_or_its_classes(loaded, home, name):
    model, processor = loaded[name]
    before = left_on(model)
    generate(model, processor, QUESTION, image=home / "a.png", pruner="norm", keep_tokens=2)
    assert left_on(model) == before
    broken = stream_generate(model, processor, QUESTION, image=home / "a.png", max_tokens=9)
    next(broken)
    broken.close()  # and after an answer that nobody reads to its end
    assert left_on(model) == before


def left_on(model) -> list:
    """Everything a module and its class hold, by identity."""
    held = []
    for name, module in model.named_modules():
        held.append((name, {k: id(v) for k, v in vars(type(module)).items()}))
        held.append((name, {k: id(v) for k, v in vars(module).items()}))
        held.append((name, {k: id(v) for k, v in module.items()}))
    return held


def test_the_stock_model_answers_afterwards_as_before(loaded, home):
    from mlx_vlm import apply_chat_template
    from mlx_vlm import stream_generate as stock

    model, processor = loaded["qwen2_5_vl"]
    text = apply_chat_template(processor, model.config, QUESTION, num_images=1)
    options = dict(image=str(home / "a.png"), max_tokens=4, temperature=0.0)

    def odds():
        return [np.array(p.logprobs) for p in stock(model, processor, text, **options)]

    before = odds()
    generate(model, processor, QUESTION, image=home / "b.png", pruner="norm", keep_tokens=2)
    for a, b in zip(before, odds(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_picture_is_made_to_fit_the_shape_asked_for(loaded, home):
    model, processor = loaded["qwen2_5_vl"]
    large = home / "large.png"
    host_folders.picture(home, "large.png", 224, 224)
    whole = generate(model, processor, QUESTION, image=large, max_tokens=1)
    options = {"host_options": {"resize_shape": [112]}, "max_tokens": 1}
    small = generate(model, processor, QUESTION, image=large, **options)
    assert (whole.visual_tokens, small.visual_tokens) == (64, 16)


def test_a_model_that_mlx_vlm_itself_loaded_is_taken_as_well(home):
    from mlx_vlm import load as their_load

    model, processor = their_load(str(home / "llava"))
    answer = generate(
        model, processor, QUESTION, image=home / "a.png", pruner="norm", keep_tokens=4, max_tokens=2
    )
    assert answer.visual_tokens_kept == 4


def test_half_precision_becomes_float32_on_a_cpu_unless_one_says_otherwise(tmp_path):
    folder = host_folders.checkpoint("llava", tmp_path)
    held = mx.load(str(folder / "model.safetensors"))
    half = {name: array.astype(mx.bfloat16) for name, array in held.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), half, metadata={"format": "mlx"})
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    for dtype, expected in (
        ("auto", mx.float32 if on_cpu else mx.bfloat16), ("float16", mx.float16),
    ):  # fmt: skip
        model, _ = load(folder, dtype=dtype)
        assert model.language_model.model.norm.weight.dtype == expected


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--pruner", "fastv+restore", "--keep-ratio", "0.5"], "share no mask"),
        (["--pruner", "norm", "--keep-tokens", "0"], "it must be a whole number, at least 1"),
        (["--pruner", "norm", "--positions", "keep"], "counts the rows it is given"),
        (["--kv-bits", "99"], "--kv-bits is 99; it must be from 1.5 to 8"),
        (["--kv-bits", "7"], "--kv-bits is 7; it must be from 1.5 to 8, and not 7"),
        (["--pruner", "fastv", "--kv-bits", "3.5"], "with fastv a whole number can be had"),
        (["--quantized-kv-start", "0"], "from when on --kv-bits holds; give both"),
        (["--kv-bits", "8", "--quantized-kv-start", "-1"], "it must be at least 0"),
        (["--resize-shape", "100000"], "the most is 25000000 pixels"),
        (["--prefill-step-size", "0"], "it must be at least 1"),
        (["--resize-shape", "1", "2", "3"], "give one or two sides"),
        (["--pruner", "mlp"], "holds no weights for it"),
        (["--prompt", "see <image> w7"], "leave <image> out of the prompt"),
        (["--image", "/nowhere.png"], "nowhere.png"),
    ],
)
def test_a_mistake_ends_in_one_sentence(home, capsys, more, sentence):
    assert sentence in refused(capsys, command(home, "llava", *more))


def test_a_models_own_mark_of_an_image_is_left_to_its_template(home, capsys):
    arguments = command(home, "qwen2_5_vl", "--prompt", "w7 <|image_pad|> w9")
    assert "leave <|image_pad|> out of the prompt" in refused(capsys, arguments)


@pytest.mark.parametrize(
    "config, sentence",
    [
        ({"model_type": "mllama"}, "cross-attention"),
        ({"model_type": "qwen2_vl", "model_file": "evil.py"}, "no code from a folder is"),
        ({"model_type": "qwen2_vl"}, "mlx-vlm cannot load"),
        ({"model_type": "phi3_v"}, "is a phi3_v model, and there is no pruning in those; there is"),
        ({"model_type": "deepseek_vl_v2"}, "is a deepseek_vl_v2 model, and there is no pruning"),
        ({"model_type": "kimi_vl"}, "is a kimi_vl model, and there is no pruning"),
        ({"model_type": "qwen9_vl", "vision_config": {}}, "is a qwen9_vl model"),
    ],
)
def test_a_folder_that_cannot_be_had_is_refused(tmp_path, capsys, config, sentence):
    (tmp_path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"a": mx.zeros(1)})
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    argv = ["--model", str(tmp_path), "--prompt", QUESTION]
    assert sentence in refused(capsys, argv)


def test_without_mlx_vlm_it_says_what_to_install(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_vlm.utils", None)
    with pytest.raises(UserError, match=r"pip install 'mlx-vlm-prune\[mlx-vlm\]'"):
        load(home / "llava")


def test_a_model_nobody_wrote_down_is_refused_by_name():
    class Other:
        class config:
            model_type = "kimi_vl"

    with pytest.raises(UserError, match="no pruning in kimi_vl models; there is in llava"):
        generate(Other(), None, QUESTION)
