"""Promises about folders of LLaVA-style models: whose they are, converted there and back,
refused by name, and read within their memory.
"""

import json
import shutil
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from convert.__main__ import main
from convert.describe import describe
from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.families import read_checkpoint
from mlx_vlm_prune.checkpoints.llava.published import is_for_our_decoder
from mlx_vlm_prune.hosts.loading import kind_of
from mlx_vlm_prune.inputs.preprocessor import Preprocessor
from mlx_vlm_prune.inputs.prompt import Tokenizer, tokenize_prompt
from mlx_vlm_prune.models import memory

from . import llava
from .llava import N
from .test_llava import ours, pixels, theirs


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as transformers writes it, and the same weights there and here."""
    model = llava.random_model()
    folder = llava.write(model, tmp_path_factory.mktemp("published"))
    return SimpleNamespace(folder=folder, theirs=model, ours=load(folder, dtype="float32")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", llava.RENAMED)
def test_there_and_back_gives_the_same_bytes_under_the_same_names(layout, dtype, tmp_path, capsys):
    folder = llava.write(llava.random_model(), tmp_path / "hf", layout, dtype)
    for name in ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"):
        (folder / name).write_text(f'{{"{name}": 0}}')  # what a tokenizer may have, too
    main(["to-mlx", str(folder), str(tmp_path / "mlx")])
    assert json.loads((tmp_path / "mlx" / "config.json").read_text())["published_as"] == layout
    for way in ("to-torch", "to-hf"):
        main([way, str(tmp_path / "mlx"), str(tmp_path / way)])
        was, now = (load_file(f / "model.safetensors") for f in (folder, tmp_path / way))
        assert was.keys() == now.keys()
        for name in was:
            assert was[name].dtype == now[name].dtype and was[name].shape == now[name].shape
            assert was[name].view(torch.uint8).equal(now[name].view(torch.uint8)), name
        for file in (f for f in folder.iterdir() if f.suffix != ".safetensors"):
            assert (tmp_path / way / file.name).read_bytes() == file.read_bytes(), file.name
        assert (tmp_path / way / "generation_config.json").is_file()


def test_what_comes_back_is_read_by_transformers(published, tmp_path, capsys):
    from transformers import LlavaForConditionalGeneration

    main(["to-mlx", str(published.folder), str(tmp_path / "mlx")])
    main(["to-hf", str(tmp_path / "mlx"), str(tmp_path / "hf")])
    assert "LlavaForConditionalGeneration" in capsys.readouterr().out
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    np.testing.assert_array_equal(
        theirs(again, llava.prompt(), pixels()), theirs(published.theirs, llava.prompt(), pixels())
    )


def test_a_converted_folder_and_a_quantized_one_answer_pruned(published, tmp_path, capsys):
    picture = Image.fromarray(np.random.randint(0, 255, (80, 96, 3), np.uint8))
    main(["to-mlx", str(published.folder), str(tmp_path / "mlx")])
    options = ["-q", "--q-group-size", "32"]
    main(["to-mlx", str(published.folder), str(tmp_path / "few"), *options])
    answers = []
    for place in (published.folder, tmp_path / "mlx", tmp_path / "few"):
        model, processor = load(place)
        answer = generate(
            model, processor, "where is the star ?", image=picture, max_tokens=4,
            pruner="visionzip+fastv", keep_ratio=0.5,
        )  # fmt: skip
        assert answer.visual_tokens == N and answer.visual_tokens_kept == N // 2
        answers.append(answer.token_ids)
    assert answers[0] == answers[1]


def test_a_seven_billion_model_is_inspected_and_refused_where_memory_does_not_suffice(
    tmp_path, capsys, monkeypatch
):
    """LLaVA-1.5-7B's config.json as published, and its tensors' headers: the data is a hole."""
    llava.write_seven_billion(tmp_path)
    main(["inspect", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "32 layers of 4096, Llama-like" in printed
    assert "CLIP, 24 layers of 1024, 24 x 24 patches of 14 pixels, features of layer 23" in printed
    assert (
        "two layers, 1024 to 4096" in printed and "14126.9 MB, F16" in printed
    )  # 7,063,427,072 weights
    monkeypatch.setattr(memory, "available_bytes", lambda: 16 * 10**9)
    with pytest.raises(UserError, match=r"needs 28.3 GB for its weights, and 16.0 GB are avail"):
        load(tmp_path, dtype="float32")


def test_inspect_says_what_it_is_published_and_converted(published, tmp_path, capsys):
    main(["to-mlx", str(published.folder), str(tmp_path / "mlx")])
    capsys.readouterr()
    for place in (published.folder, tmp_path / "mlx"):
        main(["inspect", str(place)])
        printed = capsys.readouterr().out
        assert "(llava-hf-flat)" in printed or "llava-hf-flat" in printed
        assert "4, and 4 for keys and values (from config.json)" in printed
        assert "CLIP, 4 layers of 32, 4 x 4 patches of 16 pixels" in printed
        assert "missing         nothing" in printed


def _in(part: str, **values):
    return lambda config: {**config, part: {**config[part], **values}}


REFUSED = {
    "CLS among the tokens": (
        lambda config: {**config, "vision_feature_select_strategy": "full"},
        "vision_feature_select_strategy is 'full'; clip_vision_model needs default",
    ),
    "several layers": (
        lambda config: {**config, "vision_feature_layer": [-2, -1]},
        r"vision_feature_layer is \[-2, -1\]; one of 4 layers is supported",
    ),
    "a layer that is not there": (
        lambda config: {**config, "vision_feature_layer": -6},
        "vision_feature_layer is -6; one of 4 layers",
    ),
    "another rotation": (
        _in("text_config", rope_parameters={"rope_type": "linear", "factor": 2.0}),
        "rope_parameters of llama is .* not supported",
    ),
    "other sizes than the tensors": (
        _in("text_config", intermediate_size=97), r"is \(96, 64\); \(97, 64\) is expected",
    ),
    "no language model": (
        lambda config: {**config, "text_config": 5}, "config.json: text_config is 5, not an object",
    ),
    "layers below none": (
        _in("text_config", num_hidden_layers=-3),
        r"hf/config.json: text_config.num_hidden_layers is -3, not a whole number",
    ),
    "another activation": (
        lambda config: {**config, "projector_hidden_act": "relu"}, "is 'relu', not gelu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_computed_otherwise_is_refused_by_name(kind, tmp_path):
    change, sentence = REFUSED[kind]
    folder = llava.write(llava.random_model(), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config)))
    with pytest.raises(UserError, match=sentence):
        load(folder)


FOREIGN = {
    "no language model is called 'mistral'": _in("text_config", model_type="mistral"),
    "no tower is called 'pixtral'": _in("vision_config", model_type="pixtral"),
}


@pytest.mark.parametrize("sentence", FOREIGN)
def test_other_parts_than_ours_are_left_to_mlx_vlm_and_not_converted(
    sentence, published, tmp_path, monkeypatch
):
    folder = shutil.copytree(published.folder, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(FOREIGN[sentence](config)))
    monkeypatch.setitem(sys.modules, "mlx_vlm.utils", None)
    with pytest.raises(UserError, match="a llava model needs mlx-vlm"):
        load(folder)
    with pytest.raises(UserError, match=sentence):
        read_checkpoint(folder)


def rewritten(folder, metadata, *, axes=(0, 1, 2, 3), without=""):
    """The same weights, the patches' convolution with its axes in another order."""
    file = folder / "model.safetensors"
    state = {k: v for k, v in load_file(file).items() if not without or without not in k}
    for name, tensor in state.items():
        if name.endswith("patch_embedding.weight"):
            state[name] = tensor.permute(axes).contiguous()
    save_file(state, file, metadata=metadata)


MLX, PT, LAST = {"format": "mlx"}, {"format": "pt"}, (0, 2, 3, 1)
WRITERS = {  # metadata, the convolution's axes, what is left out, and whether it is ours
    "transformers": (PT, (0, 1, 2, 3), "", True),
    "transformers, and nothing says so": (None, (0, 1, 2, 3), "", True),
    "transformers, saved again by MLX": (MLX, (0, 1, 2, 3), "", True),
    "mlx-vlm": (MLX, LAST, "", False),
    "mlx-vlm, and nothing says so": (None, LAST, "", False),
    "transformers, its tower elsewhere": (PT, LAST, "vision_tower", True),
    "mlx-vlm, its tower elsewhere": (MLX, LAST, "vision_tower", False),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_llava_is_ours_as_transformers_wrote_it_and_mlx_vlms_as_that_did(
    writer, published, tmp_path
):
    metadata, axes, without, expected = WRITERS[writer]
    folder = shutil.copytree(published.folder, tmp_path / "hf")
    rewritten(folder, metadata, axes=axes, without=without)
    assert is_for_our_decoder(folder) is expected
    assert kind_of(folder) == (None if expected else "llava")


def test_what_was_saved_again_by_mlx_answers_as_before(published, tmp_path):
    folder = shutil.copytree(published.folder, tmp_path / "hf")
    rewritten(folder, MLX)
    prompt, pixels_I3HW = llava.prompt(), pixels()
    model, _ = load(folder, dtype="float32")
    np.testing.assert_array_equal(
        ours(model, prompt, pixels_I3HW), ours(published.ours, prompt, pixels_I3HW)
    )


def test_with_patches_of_three_pixels_the_metadata_tell(published, tmp_path):
    folder = shutil.copytree(published.folder, tmp_path / "hf")
    for metadata, expected in ((PT, True), (MLX, False)):
        state = {"vision_tower.embeddings.patch_embedding.weight": torch.zeros(2, 3, 3, 3)}
        save_file(state, folder / "model.safetensors", metadata=metadata)
        assert is_for_our_decoder(folder) is expected


def test_what_mlx_vlm_converted_is_inspected_and_not_converted(published, tmp_path):
    folder = shutil.copytree(published.folder, tmp_path / "hf")
    rewritten(folder, MLX, axes=LAST)
    assert "for mlx-vlm, if it knows this kind: nothing is to be" in dict(describe(folder))["model"]
    with pytest.raises(UserError, match="a LLaVA that mlx-vlm converted: it is loaded as"):
        read_checkpoint(folder)


def test_pytorchs_own_files_are_ours_and_a_folder_without_weights_is_mlx_vlms(published, tmp_path):
    folder = shutil.copytree(published.folder, tmp_path / "hf")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert not is_for_our_decoder(folder)
    torch.save(state, folder / "pytorch_model.bin")
    assert is_for_our_decoder(folder)
    prompt, pixels_I3HW = llava.prompt(), pixels()
    model, _ = load(folder, dtype="float32")
    np.testing.assert_array_equal(
        ours(model, prompt, pixels_I3HW), ours(published.ours, prompt, pixels_I3HW)
    )


@pytest.mark.parametrize("kind", ["as published", "as ours"])
@pytest.mark.parametrize("was, now", [("float16", "float32"), ("float32", "float16")])
def test_a_change_of_precision_holds_no_second_copy_of_the_weights(kind, was, now, tmp_path):
    """But for two tensors on their way, and a tenth for what else is there."""
    model = llava.random_model()
    folder = llava.write(model, tmp_path / "hf", dtype=getattr(torch, was))
    if kind == "as ours":
        main(["to-mlx", str(folder), str(tmp_path / "mlx")])
        folder = tmp_path / "mlx"
    sizes, size = [p.numel() for p in model.parameters()], 4 if now == "float32" else 2
    needed, other = size * sum(sizes), 6 - size
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    kept = load(folder, dtype=now)
    peak = mx.get_peak_memory() - before
    assert kept and needed <= peak < 1.1 * needed + 2 * other * max(sizes)
    assert 1.1 * needed + 2 * other * max(sizes) < needed + other * sum(sizes), "two would pass"


def test_a_model_that_does_not_fit_into_memory_is_refused_before_it_is_read(
    published, monkeypatch, tmp_path, capsys
):
    main(["to-mlx", str(published.folder), str(tmp_path / "mlx")])
    size = sum(p.numel() for p in published.theirs.parameters()) * 4
    for place in (published.folder, tmp_path / "mlx"):
        monkeypatch.setattr(memory, "available_bytes", lambda: size)
        load(place)
        monkeypatch.setattr(memory, "available_bytes", lambda: size - 1)
        with pytest.raises(UserError, match=r"needs 0.0 GB for its weights, and 0.0 GB are avail"):
            load(place, dtype="float32")
        load(place, dtype="float16")


def test_ids_of_a_question_equal_those_of_transformers_tokenizer_and_template(tmp_path):
    from transformers import AutoTokenizer

    folder = llava.llama_words(tmp_path / "words", llava.LLAVA_1_5)
    prompt = tokenize_prompt(Tokenizer.from_folder(folder), "What is this?", [3], "<image>")
    other = AutoTokenizer.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = other.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=llava.LLAVA_1_5, tokenize=False,
        add_generation_prompt=True,
    )  # fmt: skip
    assert text == "USER: <image>\nWhat is this? ASSISTANT:"
    expected = other(text.replace("<image>", "<image>" * 3))["input_ids"]
    assert prompt.ids == expected and expected.count(1) == 1 and expected[0] == 1
    assert prompt.runs == [(expected.index(other.convert_tokens_to_ids("<image>")), 3)]


def test_a_folder_without_a_template_is_asked_as_vicuna_was_trained(published, tmp_path):
    folder = llava.write(llava.random_model(), tmp_path / "hf")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    _, processor = load(folder)
    text = processor.tokenizer.render([{"role": "user", "content": "<image>\nWhat is this?"}])
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant"
        " gives helpful, detailed, and polite answers to the user's questions."
        " USER: <image>\nWhat is this? ASSISTANT:"
    )


def test_memory_is_what_linux_says_is_free_but_no_more_than_a_container_leaves(
    tmp_path, monkeypatch
):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available_bytes() == 5000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert memory.available_bytes() == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes() == 5000 * 1024


def test_a_picture_is_made_square_before_it_is_cropped():
    """3 x 1 pixels: the mean's colour above and below, the left-over row below."""
    picture = Image.fromarray(np.full((2, 5, 3), 200, np.uint8))
    square = np.array(Preprocessor(size=5, crop=(5, 5), pad=True).visible(picture))
    around = [int(255 * x) for x in Preprocessor().mean]
    assert square.shape == (5, 5, 3)
    assert [row[0].tolist() == around for row in square] == [True, False, False, True, True]
    assert (square[1:3] == 200).all()
