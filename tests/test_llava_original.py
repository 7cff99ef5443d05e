"""Promises about LLaVA-1.5 as its authors publish it: found, put together, prompt and given back.

The oracle is transformers' LlavaForConditionalGeneration with the same weights.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from convert.__main__ import main
from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.families import read_checkpoint
from mlx_vlm_prune.hosts.loading import kind_of
from mlx_vlm_prune.inputs.prompt import tokenize_prompt
from torch_ref.models.loading import load_llava

from . import llava
from .llava import IMAGE, SIDE, WORDS, N
from .pruner_cases import close
from .test_llava import CPU, ours, pixels, theirs

APART = ("vicuna", "vicuna, last layer")
INSIDE = "vicuna, heads as wide as OpenAI's"  # which no tensor tells
TOWER = "clip-vit-large-patch14-336"


def converted(folder, target, *more):
    """With the tower beside it, where there is one."""
    beside = folder.parent / "clip"
    vision = ["--vision", str(beside)] if beside.is_dir() else []
    main(["to-mlx", str(folder), str(target), *vision, *more])
    return target


def raw(path) -> dict[str, torch.Tensor]:
    """The tensors of a folder as they are, by whatever names."""
    state = {}
    for file in sorted(path.iterdir()):
        if file.suffix == ".bin":
            state |= torch.load(file)
        if file.suffix == ".safetensors":
            state |= load_file(file)
    return state


def same_bytes(was, now):
    assert was.keys() == now.keys()
    for name in was:
        assert was[name].dtype == now[name].dtype and was[name].shape == now[name].shape
        assert was[name].view(torch.uint8).equal(now[name].view(torch.uint8)), name


# --- what it computes -----------------------------------------------------------------


@pytest.mark.parametrize("kind, inside", [(APART[0], False), (APART[1], False), (INSIDE, True)])
def test_logits_equal_those_of_transformers(kind, inside, tmp_path, capsys):
    model = llava.random_model(kind)
    folder = llava.write_original(model, tmp_path / "llava-v1.5", inside=inside)
    if not inside:
        shutil.copytree(tmp_path / "clip", folder / TOWER)
    prompt, pixels_I3HW = llava.prompt(2), pixels(2)
    expected = theirs(model, prompt, pixels_I3HW)[:, :WORDS]
    assert np.abs(expected).max() > 0.5
    close(ours(load(folder, dtype="float32")[0], prompt, pixels_I3HW), expected)
    target = converted(folder, tmp_path / "mlx")
    close(ours(load(target, dtype="float32")[0], prompt, pixels_I3HW), expected)
    with torch.no_grad():
        close(load_llava(folder, CPU).logits([prompt], pixels_I3HW)[0].numpy(), expected)


def test_another_tower_gives_other_logits(tmp_path):
    """The check can fail."""
    folder = llava.write_original(llava.random_model(), tmp_path / "llava-v1.5")
    llava.write_original(llava.random_model(seed=1), tmp_path / "other" / "llava")
    shutil.copytree(tmp_path / "other" / "clip", folder / TOWER)
    prompt, pixels_I3HW = llava.prompt(), pixels()
    expected = theirs(llava.random_model(), prompt, pixels_I3HW)[:, :WORDS]
    with pytest.raises(AssertionError):
        close(ours(load(folder, dtype="float32")[0], prompt, pixels_I3HW), expected)


@pytest.mark.parametrize("fields", [{"mm_projector_type": "linear"}, {}], ids=["named", "unnamed"])
def test_a_projector_may_be_one_matrix(fields, tmp_path, capsys):
    """As in the first LLaVA, whose config.json names no kind."""
    model = llava.random_model(INSIDE)
    folder = llava.write_original(model, tmp_path / "llava", inside=True)
    model.model.multi_modal_projector = linear = torch.nn.Linear(128, 64)
    config = json.loads((folder / "config.json").read_text())
    config.pop("mm_projector_type")
    (folder / "config.json").write_text(json.dumps(config | fields))
    state = {k: v for k, v in raw(folder).items() if "mm_projector" not in k}
    state |= {f"model.mm_projector.{k}": v.data for k, v in linear.named_parameters()}
    llava.write_pickles(state, folder)
    prompt, pixels_I3HW = llava.prompt(), pixels()
    expected = theirs(model, prompt, pixels_I3HW)[:, :WORDS]
    close(ours(load(folder, dtype="float32")[0], prompt, pixels_I3HW), expected)
    with torch.no_grad():
        close(load_llava(folder, CPU).logits([prompt], pixels_I3HW)[0].numpy(), expected)
    main(["to-torch", str(converted(folder, tmp_path / "mlx")), str(tmp_path / "back")])
    same_bytes(state, raw(tmp_path / "back"))
    with pytest.raises(UserError, match="no class for a LLaVA whose projector is linear"):
        from convert.to_hf import to_hf

        to_hf(tmp_path / "mlx", tmp_path / "hf")


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_a_converted_folder_and_a_quantized_one_answer_pruned(model_type, tmp_path, capsys):
    folder = llava.write_original(llava.random_model(), tmp_path / "llava", model_type=model_type)
    assert kind_of(folder) is None
    picture = Image.fromarray(np.random.randint(0, 255, (80, 96, 3), np.uint8))
    few = ["-q", "--q-group-size", "32"]
    for place in (converted(folder, tmp_path / "mlx"), converted(folder, tmp_path / "few", *few)):
        model, processor = load(place)
        answer = generate(
            model, processor, "Where is it?", image=picture, max_tokens=4,
            pruner="visionzip+fastv", keep_ratio=0.5,
        )  # fmt: skip
        assert answer.visual_tokens == N and answer.visual_tokens_kept == N // 2


# --- what is prompt of it --------------------------------------------------------------


def test_ids_of_a_question_equal_those_of_the_authors(tmp_path):
    """They cut the text at <image>, encode each piece, drop every <s> but the first, and put
    a number between that is no token's."""
    from transformers import AutoTokenizer

    folder = llava.write_original(llava.random_model(), tmp_path / "llava", inside=True)
    _, processor = load(folder)
    prompt = tokenize_prompt(processor.tokenizer, "What is this?", [3], processor.image_token)
    text = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant"
        " gives helpful, detailed, and polite answers to the user's questions."
        " USER: <image>\nWhat is this? ASSISTANT:"
    )
    encode, expected = AutoTokenizer.from_pretrained(llava.llama_words(tmp_path / "words")), []
    for i, piece in enumerate(text.split("<image>")):
        ids = encode(piece).input_ids
        assert ids[0] == 1
        expected += ([-200] * 3 + ids[1:]) if i else ids
    (start, length), unknown = prompt.runs[0], encode.convert_tokens_to_ids("<unk>")
    assert length == 3 and prompt.ids[start : start + 3] == [unknown] * 3
    assert [*prompt.ids[:start], *[-200] * 3, *prompt.ids[start + 3 :]] == expected


@pytest.mark.parametrize("shape, pads", [("pad", True), ("square", False), (None, False)])
def test_pictures_are_made_square_where_it_was_trained_so(shape, pads, tmp_path, capsys):
    fields = {"image_aspect_ratio": shape}
    folder = llava.write_original(llava.random_model(), tmp_path / "llava", **fields)
    shutil.copytree(tmp_path / "clip", folder / TOWER)
    white = Image.new("RGB", (2 * SIDE, SIDE), "white")
    for place in (folder, converted(folder, tmp_path / "mlx")):
        visible = np.array(load(place)[1].image.visible(white))
        assert visible.shape == (SIDE, SIDE, 3)
        assert (visible[SIDE // 2] == 255).all() and (visible[0, 0] == 255).all() != pads
    main(["to-hf", str(tmp_path / "mlx"), str(tmp_path / "hf")])
    reading = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert reading.get("do_pad", False) is pads


def test_a_token_that_the_vocabulary_lacks_is_refused(tmp_path):
    """A tokenizer from elsewhere may have more, as Hugging Face's has."""
    folder = llava.write_original(llava.random_model(), tmp_path / "llava", inside=True)
    model, processor = load(folder)
    with pytest.raises(UserError, match="the prompt has token 100; the model's vocabulary has 99"):
        generate(model, processor, "What is <pad>?")


# --- there and back -------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True], ids=["tower apart", "tower inside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_there_and_back_gives_the_same_bytes_under_the_same_names(inside, dtype, tmp_path, capsys):
    folder = llava.write_original(llava.random_model(), tmp_path / "llava", dtype, inside)
    target = converted(folder, tmp_path / "mlx")
    vision = [] if inside else ["--vision", str(tmp_path / "tower")]
    main(["to-torch", str(target), str(tmp_path / "back"), *vision])
    same_bytes(raw(folder), raw(tmp_path / "back"))
    config, again = (
        json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "back")
    )
    assert config == again
    if not inside:
        clip = {k: v for k, v in raw(tmp_path / "clip").items() if k.startswith("vision_model.")}
        same_bytes(clip, raw(tmp_path / "tower"))
        again = converted(folder, tmp_path / "again", "--vision", str(tmp_path / "tower"))
        same_bytes(raw(target), raw(again))


def test_for_transformers_it_becomes_a_llava_of_theirs(tmp_path, capsys):
    from transformers import LlavaForConditionalGeneration

    model = llava.random_model()
    folder = llava.write_original(model, tmp_path / "llava", rope_theta=5e4)
    model, processor = load(converted(folder, tmp_path / "mlx"), dtype="float32")
    main(["to-hf", str(tmp_path / "mlx"), str(tmp_path / "hf")])
    assert "the whole model, for transformers' LlavaForCond" in capsys.readouterr().out
    there = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    prompt = tokenize_prompt(processor.tokenizer, "What is this?", [N], processor.image_token)
    assert there.config.image_token_id == prompt.ids[prompt.runs[0][0]] != IMAGE
    expected = theirs(there, prompt, pixels())
    close(ours(model, prompt, pixels()), expected)
    again, _ = load(tmp_path / "hf", dtype="float32")
    np.testing.assert_array_equal(ours(again, prompt, pixels()), ours(model, prompt, pixels()))


def test_inspect_says_what_it_is_with_and_without_its_tower(tmp_path, capsys):
    folder = llava.write_original(llava.random_model(), tmp_path / "llava")
    main(["inspect", str(folder)])
    printed = capsys.readouterr().out
    assert (
        "a LLaVA-1.5 in its authors' layout" in printed and "3 layers of 64, Llama-like" in printed
    )
    assert f"not here: give the folder of openai/{TOWER} with --vision" in printed
    main(["inspect", str(folder), "--vision", str(tmp_path / "clip")])
    printed = capsys.readouterr().out
    assert "CLIP, 4 layers of 32, 4 x 4 patches of 16 pixels, features of layer 3" in printed
    assert f"in {tmp_path / 'clip'}" in printed and "missing         nothing" in printed
    main(["inspect", str(converted(folder, tmp_path / "mlx"))])
    assert "llava-apart" in capsys.readouterr().out


# --- what a user may give -------------------------------------------------------------

REFUSED = {
    "model_type is 'llava_mistral'": {"model_type": "llava_mistral"},
    "mm_projector_type is 'mlp3x_gelu'; .* has linear or mlp2x_gelu": {
        "mm_projector_type": "mlp3x_gelu"
    },
    "mm_vision_select_feature is 'cls_patch'": {"mm_vision_select_feature": "cls_patch"},
    "mm_resampler_type is 'qformer'; .* has none": {"mm_resampler_type": "qformer"},
    "mm_use_im_start_end is 'True'": {"mm_use_im_start_end": True},
    "image_aspect_ratio is 'anyres'; .* has square or pad": {"image_aspect_ratio": "anyres"},
    "mm_patch_merge_type is 'spatial_unpad'": {"mm_patch_merge_type": "spatial_unpad"},
    "s2 is 'True'": {"s2": True},
    "inside is laion/CLIP-ViT-H-14; of towers inside only OpenAI's clip-vit-": {
        "mm_vision_tower": "laion/CLIP-ViT-H-14"
    },
    "vision_feature_layer is -9; one of 4 layers": {"mm_vision_select_layer": -9},
    "rope_scaling of llama is .* not supported": {"rope_scaling": {"type": "linear", "factor": 2}},
    r"is \(96, 64\); \(97, 64\) is expected": {"intermediate_size": 97},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_computed_otherwise_is_refused_by_name(sentence, tmp_path):
    fields = REFUSED[sentence]
    folder = llava.write_original(llava.random_model(), tmp_path / "llava", inside=True, **fields)
    for step in (load, read_checkpoint):
        with pytest.raises(UserError, match=sentence):
            step(folder)


def test_apples_fastvlm_stays_with_mlx_vlm(tmp_path):
    """Its config.json names an mm_vision_tower too."""
    folder = llava.write_original(
        llava.random_model(), tmp_path / "llava", model_type="llava_qwen2"
    )
    assert kind_of(folder) == "llava_qwen2"
    with pytest.raises(
        UserError, match=r"model_type is 'llava_qwen2'; .* has llava or llava_llama"
    ):
        read_checkpoint(folder)


def test_a_tower_that_is_missing_or_another_is_named(tmp_path):
    folder = llava.write_original(llava.random_model(), tmp_path / "llava")
    with pytest.raises(UserError, match=f"no vision tower: give the folder of openai/{TOWER} to"):
        load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "a/.."}))
    with pytest.raises(UserError, match=r"or put it at .*llava/clip$"):  # never outside the folder
        load(folder)
    clip = tmp_path / "clip" / "config.json"
    config = json.loads(clip.read_text())
    clip.write_text(json.dumps({**config, "model_type": "siglip"}))
    with pytest.raises(UserError, match="clip is a 'siglip'; the tower of a LLaVA"):
        read_checkpoint(folder, tmp_path / "clip")
    config["vision_config"]["patch_size"] = 8
    clip.write_text(json.dumps(config))
    with pytest.raises(UserError, match="says patch_size 8, but its tensors say 16"):
        read_checkpoint(folder, tmp_path / "clip")


def test_a_tower_is_not_given_twice(tmp_path, capsys):
    whole = llava.write_original(llava.random_model(), tmp_path / "whole", inside=True)
    theirs_too = llava.write(llava.random_model(), tmp_path / "hf")
    llava.write_original(llava.random_model(), tmp_path / "apart")
    for folder in (whole, theirs_too):
        with pytest.raises(
            UserError, match="holds the tower it was trained with; leave out vision="
        ):
            read_checkpoint(folder, tmp_path / "clip")
    main(["to-mlx", str(whole), str(tmp_path / "mlx")])
    with pytest.raises(SystemExit):
        main(["to-torch", str(tmp_path / "mlx"), str(tmp_path / "x"), "--vision", str(tmp_path)])
    assert "was published with its tower inside; leave out --vision" in capsys.readouterr().err


def test_a_tokenizer_without_the_unknown_token_is_refused(tmp_path):
    folder = llava.write_original(llava.random_model(), tmp_path / "llava", inside=True)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<unk>", "<new>"))
    with pytest.raises(UserError, match="has no token '<unk>', which is put where an image goes"):
        load(folder)
    file.unlink()
    with pytest.raises(
        UserError, match=r"there is no .*tokenizer.json; give the folder of the tok"
    ):
        load(folder)
