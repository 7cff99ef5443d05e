"""Promises of a chat with our models: each turn is what reading everything again gives, the tower
runs once an image, and rows are read again where they are the same."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune import Chat, generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generation.request import Request
from mlx_vlm_prune.generation.stream import PromptRead, pipeline_for, stream_answer
from mlx_vlm_prune.inputs.budget import budget
from mlx_vlm_prune.inputs.messages import Turn, tokenize_conversation
from mlx_vlm_prune.inputs.prompt import VICUNA, Tokenizer, tokenize_prompt
from mlx_vlm_prune.machine.clock import request_clock
from mlx_vlm_prune.models.towers.vit import VisionTower
from mlx_vlm_prune.pruners import METHODS, Stage

from . import backbones, llava, tiny

TURNS = [("how many stars ?", "a.png"), ("is it red ?", None), ("the sign ?", "b.png"), ("a ?", ())]
CHAINS = ["visionzip+divprune", "cls_attention+restore", "tome+cdpruner", "norm+fastv", "none"]
CHAINS += ["norm+ivc"]
SPECS = [n for n in METHODS if n not in ("none", "restore", "ivc", "attention_pool")] + CHAINS
CASES = [
    ("tiny", spec)
    for spec in (*SPECS, "mlp:dynamic", "divprune:budget=similarity", "cdpruner renumbered")
]
CASES += [("llava", spec) for spec in ("cdpruner", "mmtok", "visionzip", "fastv", "none")]
CASES += [("qwen3", spec) for spec in ("cdpruner", "fastv")] + [("mamba", "cdpruner")]


def write_pictures(folder: Path) -> None:
    for seed, name in enumerate(("a.png", "b.png")):
        pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two pictures, and models on demand."""
    folder = tmp_path_factory.mktemp("chat")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(home):
    """A model and its processor by the name of its kind, loaded once."""
    models = {}

    def of_kind(kind: str):
        if kind not in models:
            place = home / kind
            place.mkdir()
            if kind == "tiny":
                folder = tiny.checkpoint(tiny.taught(tiny.reference()), place)
            elif kind == "llava":
                folder = llava.write(llava.random_model(), place)
            else:
                folder = backbones.write(kind, place)
            models[kind] = load(folder, dtype="float32")
        return models[kind]

    return of_kind


def recorder(logits: list) -> dict:
    """An option that collects the logits of every token of the answers."""

    def record(tokens_L: mx.array, logits_1V: mx.array) -> mx.array:
        logits.append(np.array(logits_1V))
        return logits_1V

    return {"logits_processors": [record]}


def options_of(case: str) -> dict:
    spec, _, renumbered = case.partition(" ")
    stages = {METHODS[re.split("[:+]", part)[0]].stage for part in spec.split("+")}
    many = 9 if Stage.DECODER in stages else 5  # of 16; of three layers the first hold all
    policy = "renumber" if renumbered else None
    return {} if spec == "none" else {"pruner": spec, "keep_tokens": many, "positions": policy}


def scratch(model, processor, history, question, images, options, logits):
    """The whole answer where the prompt of all turns is read at once, all pictures together."""
    request = Request(question, images, **options, **recorder(logits), max_tokens=5)
    pipeline = pipeline_for(model, request.pruner)
    K = budget(model.N, None, request.keep_tokens, pipeline)
    counts = [model.N] * len(images)
    prompt = tokenize_conversation(
        processor.tokenizer, history, question, counts, processor.image_token
    )
    visible = [processor.image.visible(image) for image in images]
    pixels = mx.array(np.stack([processor.image.values(picture) for picture in visible]))
    prefill = model([prompt], pixels, pipeline, K, request.positions)
    read = PromptRead(prompt.ids, visible, pipeline, prefill)
    *_, last = stream_answer(model, processor, request, read, request_clock())
    return last.result


@pytest.mark.parametrize(("kind", "spec"), CASES)
def test_every_turn_is_what_reading_all_turns_from_scratch_gives(kind, spec, home, loaded):
    if kind in backbones.KINDS:
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    model, processor = loaded(kind)
    options, logits = options_of(spec), []
    chat = Chat(model, processor, **options, **recorder(logits), max_tokens=5)
    for question, name in TURNS:
        history = list(chat.turns)
        logits.clear()
        answer = chat.ask(question, [home / name] if name else None)
        expected: list = []
        whole = scratch(model, processor, history, question, chat.images, options, expected)
        assert answer.token_ids == whole.token_ids and answer.text == whole.text
        assert answer.kept_indices == whole.kept_indices
        assert (answer.prompt_tokens, answer.layers) == (whole.prompt_tokens, whole.layers)
        assert answer.cache_bytes == whole.cache_bytes
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
    assert [turn.images for turn in chat.turns] == [1, 0, 1, 0]


def test_the_first_turn_is_what_generate_answers(home, loaded):
    model, processor = loaded("tiny")
    options = dict(pruner="mmtok", keep_ratio=0.5, max_tokens=4)
    question = "first <image> then <image> ?"
    images = [home / "a.png", home / "b.png"]
    once = generate(model, processor, question, images, **options)
    chat = Chat(model, processor, **options)
    assert chat.ask(question, images).token_ids == once.token_ids
    assert chat.result.kept_indices == once.kept_indices
    chat.ask("and a <image> ?", home / "b.png")
    assert len(chat.images) == 3


def test_an_image_goes_through_the_tower_once_unless_the_method_works_inside(
    home, loaded, monkeypatch
):
    calls, run = [], VisionTower.__call__
    monkeypatch.setattr(VisionTower, "__call__", lambda *a: calls.append(1) or run(*a))
    chat = Chat(*loaded("tiny"), pruner="cdpruner", keep_tokens=5, max_tokens=3)
    for question, name in TURNS:
        chat.ask(question, [home / name] if name else None)
    assert len(calls) == 2
    chat.configure(keep_tokens=9)
    chat.ask("a ?")
    chat.configure(pruner="mmtok")
    chat.ask("a ?")
    assert len(calls) == 2
    chat.configure(pruner="tome")
    chat.ask("a ?")
    chat.ask("the ?")
    assert len(calls) == 4
    chat.configure(keep_tokens=5)
    chat.ask("a ?")
    assert len(calls) == 6


@pytest.mark.parametrize("spec", ["none", "norm", "visionzip", "tome"])
def test_rows_are_read_again_where_the_method_reads_no_words(spec, home, loaded):
    chat = Chat(*loaded("tiny"), **options_of(spec), max_tokens=3)
    chat.ask("how many stars ?", home / "a.png")
    assert chat.rows_reused == 0
    for question in ("is it red ?", "the sign ?"):
        before = chat.result.prompt_tokens
        chat.ask(question)
        assert before <= chat.rows_reused < chat.result.prompt_tokens
    chat.ask("a ?", home / "b.png")
    assert chat.rows_reused > before
    chat.configure(pruner="uniform", keep_tokens=4)
    chat.ask("a ?")
    ahead = loaded("tiny")[1].tokenizer.encode("<|im_start|>user\n")
    assert chat.rows_reused == len(ahead)  # what stands before the first image


def test_where_rows_leave_between_layers_or_there_is_a_state_all_is_read(home, loaded):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    for kind, spec in (("tiny", "fastv"), ("tiny", "norm+restore"), ("mamba", "norm")):
        chat = Chat(*loaded(kind), **options_of(spec), max_tokens=2)
        for question in ("how many stars ?", "a ?"):
            chat.ask(question, None if chat.images else home / "a.png")
            assert chat.rows_reused == 0
    chat = Chat(*loaded("tiny"), max_tokens=2)  # and what was held before is not taken for it
    chat.ask("how many stars ?", home / "a.png")
    chat.configure(pruner="fastv", keep_tokens=9)
    chat.ask("a ?")
    chat.configure(pruner="none", keep_tokens=None)
    chat.ask("a ?")
    assert chat.rows_reused == 0


def test_a_token_that_was_chosen_by_the_words_is_read_again_up_to_the_first_other_one(home, loaded):
    chat = Chat(*loaded("tiny"), pruner="cdpruner", keep_tokens=5, max_tokens=2)
    kept, ahead = [], len(loaded("tiny")[1].tokenizer.encode("<|im_start|>user\n"))
    for question in ("how many stars ?", "is it red ?", "what letter is on the sign ?"):
        kept.append(chat.ask(question, None if chat.images else home / "a.png").kept_indices[0])
        if len(kept) > 1 and kept[-1] != kept[-2]:
            same = next(n for n in range(5) if kept[-1][n] != kept[-2][n])
            assert chat.rows_reused == ahead + same
    assert any(one != kept[0] for one in kept)


def test_an_answer_that_is_not_read_to_its_end_is_in_the_conversation(home, loaded):
    model, processor = loaded("tiny")
    chat = Chat(model, processor, max_tokens=5)
    stream = chat.stream("how many stars ?", home / "a.png")
    text = next(stream).text + next(stream).text
    stream.close()
    assert chat.turns == [Turn("how many stars ?", 1, text)] and chat.result is None
    answer = chat.ask("is it red ?")
    whole = scratch(model, processor, chat.turns[:1], "is it red ?", chat.images, {}, [])
    assert chat.rows_reused > tiny.N and answer.token_ids == whole.token_ids


def test_a_mistake_leaves_the_conversation_as_it_was(home, loaded):
    chat = Chat(*loaded("tiny"), max_tokens=3)
    chat.ask("how many stars ?", home / "a.png")
    turns = list(chat.turns)
    for question, image, start in (
        ("a ?", home / "no.png", "there is no image file"),
        ("two <image> <image> ?", home / "b.png", "the prompt has 2 <image> marks"),
        ("\ud800", None, "the prompt is not valid Unicode text"),
        ("star " * 40_000, None, "the prompt has 40"),
    ):
        with pytest.raises(UserError) as refused:
            chat.ask(question, image)
        assert str(refused.value).startswith(start), refused.value
    assert (chat.turns, len(chat.images)) == (turns, 1)
    for options in ({"pruner": "nom"}, {"keep_ratio": 2}, {"pruner": "none", "keep_tokens": 3},
                    {"max_tokens": 0}, {"num_draft_tokens": 2},
                    {"host_options": {"kv_bits": 4}}):  # fmt: skip
        with pytest.raises(UserError):
            chat.configure(**options)
    assert chat.ask("is it red ?") and chat.rows_reused > tiny.N
    chat.clear()
    assert not chat.turns and chat.ask("is it red ?").visual_tokens == 0


# The prompt of several turns.
HISTORY = [Turn("what is it ?", 1, " a star "), Turn("is it red ?", 0, "yes")]


def test_the_prompt_is_the_chat_template_of_all_turns(tmp_path):
    llava.write_words(tmp_path)
    words = Tokenizer.from_folder(tmp_path)
    prompt = tokenize_conversation(words, HISTORY, "left of <image> ?", [3, 2], "@")
    turns = [("user", "@@@\nwhat is it ?"), ("assistant", "a star"), ("user", "is it red ?"),
             ("assistant", "yes"), ("user", "left of @@ ?")]  # fmt: skip
    text = words.render([{"role": role, "content": content} for role, content in turns])
    assert prompt.ids == words.encode(text)
    images = [prompt.ids[start : start + n] for start, n in prompt.runs]
    assert images == [[llava.IMAGE] * 3, [llava.IMAGE] * 2]
    one = tokenize_conversation(words, [], "what is it ?", [3], "@")
    assert one == tokenize_prompt(words, "what is it ?", [3], "@")


@pytest.mark.parametrize("template", [VICUNA, llava.TEMPLATE])
def test_an_answer_ends_once_whether_or_not_the_template_says_so(template, tmp_path):
    llava.write_words(tmp_path)
    words = Tokenizer.from_folder(tmp_path)
    words.chat_template = template.replace("</s>", "<|im_end|>")
    prompt = tokenize_conversation(words, HISTORY, "where ?", [2], "@")
    assert prompt.ids.count(words.token_id("<|im_end|>")) == 2
    with pytest.raises(UserError, match="does not keep the text of every turn"):
        words.chat_template = "{{ messages[-1]['content'] }}"
        del words._template
        tokenize_conversation(words, HISTORY, "where ?", [2], "@")
