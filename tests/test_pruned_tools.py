"""Promises of `pruned` about mlx-vlm's tools: batches, caches, several turns, and refusals.

Shapes: B prompts, L rows, V words.
"""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune import generate, load, pruned
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.prepared_inputs import PreparedInputs

from . import host_folders
from .host_models import IMAGE, KINDS, WORDS, cached_models, framed_prompt
from .host_reference import TOKENS, reference, stock
from .test_pruned import BATCHED, by_view, several

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
FOLDERS = ["llava", "qwen2_5_vl", "qwen3_vl"]
QUESTION = "w7 w9"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def models():
    return cached_models()


class Stop:
    """A tokenizer's word on where answers end: nowhere."""

    def add_eos_token_ids(self, ids: Any) -> None: ...
    def __call__(self, token: int) -> bool:
        return False


def batch(
    model: Any, prompts: list[PreparedInputs], at_once: int | None = None, **options: Any
) -> list[list[tuple[int, float]]]:
    """Tokens and log probabilities of each prompt, as mlx-vlm's server has them: embeddings one by
    one, then all ids in one batch, of which so many are read at once."""
    from mlx_vlm.generate.ar import BatchGenerator

    engine = BatchGenerator(
        model.language_model, SimpleNamespace(stopping_criteria=Stop()),
        prefill_batch_size=at_once or len(prompts), completion_batch_size=len(prompts), **options,
    )  # fmt: skip
    uids = []
    for inputs in prompts:
        ids_1L, more = mx.array(inputs.ids)[None], dict(inputs.extra)
        features = model.get_input_embeddings(ids_1L, inputs.pixels, mask=inputs.mask_1L, **more)
        more |= {name: value for name, value in features.to_dict().items() if value is not None}
        uids += engine.insert([inputs.ids], max_tokens=TOKENS, prompt_kwargs=[more])
    answers: dict[int, list[tuple[int, float]]] = {uid: [] for uid in uids}
    while engine.has_work:
        for piece in engine.next()[1]:
            answers[piece.uid].append((piece.token, piece.token_logprob))
    engine.close()
    return [answers[uid] for uid in uids]


def words(*ids: int) -> PreparedInputs:
    return PreparedInputs(list(ids), mx.ones((1, len(ids)), mx.int32))


def prompts_of(model: Any, name: str) -> list[PreparedInputs]:
    """One with one image, one of words, one with all images: none as long as another."""
    return [
        KINDS[name].inputs(model, 1), words(7, 3, 5, 11, 2, 9, 30),
        KINDS[name].inputs(model, several(name)),
    ]  # fmt: skip


def check_batch(
    models, name: str, answers, prompts: list[PreparedInputs], kept: list[list[list[int]]]
):
    for answer, inputs, kept_indices in zip(answers, prompts, kept, strict=True):
        tokens, odds = reference(models, name, inputs, kept_indices)
        assert [token for token, _ in answer] == tokens
        expected = [odds[i, token] for i, token in enumerate(tokens)]
        np.testing.assert_allclose([p for _, p in answer], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("step", [3, 2048], ids=["chunked", "default"])
@pytest.mark.parametrize("name", BATCHED)
def test_in_a_batch_every_prompt_answers_as_if_alone_pruned_or_not(models, name, step):
    model = models(name)
    prompts = prompts_of(model, name)
    with pruned(model, "vispruner", keep_ratio=0.4) as report:
        answers = batch(model, prompts, prefill_step_size=step)
    one, both = (by_view(name, prompt.kept_indices) for prompt in report.prompts)
    check_batch(models, name, answers, prompts, [one, [], both])


@pytest.mark.parametrize("name", BATCHED)
def test_a_prompt_may_join_a_batch_that_is_answering_already(models, name):
    model = models(name)
    prompts = prompts_of(model, name)
    with pruned(model, "vispruner", keep_ratio=0.4) as report:
        answers = batch(model, prompts, at_once=1)
    one, both = (by_view(name, prompt.kept_indices) for prompt in report.prompts)
    check_batch(models, name, answers, prompts, [one, [], both])


def test_in_a_batch_an_image_may_stay_whole_beside_pruned_ones(models):
    """Of twelve tokens twelve stay, of twenty-four twelve."""
    model, name = models("qwen2_5_vl"), "qwen2_5_vl"
    prompts = prompts_of(model, name)
    with pruned(model, "norm", keep_tokens=12) as report:
        answers = batch(model, prompts)
    assert [prompt.kept for prompt in report.prompts] == [[12], [12, 12]]
    assert [prompt.total for prompt in report.prompts] == [[24], [24, 12]]
    one, both = (prompt.kept_indices for prompt in report.prompts)
    check_batch(models, name, answers, prompts, [one, [], both])


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl", "idefics3", "pixtral"])
def test_a_batch_with_all_tokens_is_the_stock_batch_bit_for_bit(models, name):
    model = models(name)
    prompts = prompts_of(model, name)
    expected = batch(model, prompts)
    with pruned(model, "vispruner", keep_ratio=1.0):
        assert batch(model, prompts) == expected
    assert batch(model, prompts) == expected


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_padded_prompts_are_taken_apart(models, name):
    """Embeddings of three prompts at once, as `batch_generate` asks for them."""
    model, kind = models(name), KINDS[name]
    inputs = kind.inputs(model, 2)
    middle = len(WORDS[0]) + inputs.ids[len(WORDS[0]) :].index(WORDS[1][0])
    rows = [inputs.ids[:middle], inputs.ids[middle:], [7, 3, 5]]
    L = max(map(len, rows))
    ids_BL = mx.array([[0] * (L - len(row)) + row for row in rows])
    mask_BL = mx.array([[0] * (L - len(row)) + [1] * len(row) for row in rows])
    with pruned(model, "vispruner", keep_ratio=0.4) as report:
        x_BLD = model.get_input_embeddings(
            ids_BL, inputs.pixels, mask=mask_BL, **inputs.extra
        ).inputs_embeds
    full, _ = kind.full(model, inputs)
    for x_LD, row, image, prompt in zip(x_BLD, rows, full, report.prompts, strict=False):
        kept_rows = np.array(x_LD)[L - len(row) :]
        kept_rows = kept_rows[~np.isnan(kept_rows[:, 0])]
        (index,) = prompt.kept_indices
        kept = np.array(image)[index]
        at = next(i for i, token in enumerate(row) if token == IMAGE)
        np.testing.assert_allclose(kept_rows[at : at + len(index)], kept, atol=1e-5)
    assert not np.isnan(np.array(x_BLD[2])).any() and len(report.prompts) == 2


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return host_folders.desk(tmp_path_factory.mktemp("pruned"), FOLDERS)


@pytest.fixture(scope="module")
def loaded(home):
    return {name: load(home / name) for name in FOLDERS}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_mlx_vlms_own_generate_answers_as_ours_does(loaded, home, name):
    from mlx_vlm import apply_chat_template
    from mlx_vlm import generate as theirs

    model, processor = loaded[name]
    images = [str(home / "a.png"), str(home / "b.png")]
    text = apply_chat_template(processor, model.config, QUESTION, num_images=2)
    budget = {"keep_ratio": 0.3}
    ours = generate(model, processor, QUESTION, images, pruner="vispruner", max_tokens=6, **budget)
    with pruned(model, "vispruner", **budget) as report:
        answer = theirs(model, processor, text, image=images, max_tokens=6, temperature=0.0)
    assert (answer.text, answer.token_ids) == (ours.text, ours.token_ids)
    (prompt,) = report.prompts
    assert prompt.kept_indices == ours.kept_indices
    assert (report.kept, report.total) == (ours.visual_tokens_kept, ours.visual_tokens)
    assert prompt.rows == (answer.prompt_tokens, ours.prompt_tokens)
    assert prompt.seconds["vision"] > 0 and prompt.seconds["pruner"] > 0
    assert str(report) == "Visual tokens: 17 -> 4 (76.5% pruned)"


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_mlx_vlms_batch_generate_prunes(loaded, home, name):
    from mlx_vlm.generate import batch_generate

    model, processor = loaded[name]
    images = [str(home / f"{letter}.png") for letter in "aba"]  # two of a shape share a batch
    questions = [QUESTION, "w3", "w4 w5 w6", "w8"]
    options = dict(pruner="vispruner", keep_ratio=0.3, max_tokens=6)
    ours = [
        generate(model, processor, question, image, **options).text
        for question, image in zip(questions, [*images, None], strict=True)
    ]
    with pruned(model, "vispruner", keep_ratio=0.3) as report:
        answers = batch_generate(model, processor, images=images, prompts=questions, max_tokens=6)
    assert [text.strip() for text in answers.texts] == [text.strip() for text in ours]
    assert len(report.prompts) == 3 and report.kept < report.total


def test_a_prompt_that_ends_in_an_image_answers_from_its_last_row(models):
    model, name = models("qwen2_5_vl"), "qwen2_5_vl"
    inputs = KINDS[name].inputs(model, 1)
    ids = inputs.ids[: len(inputs.ids) - len(WORDS[2]) - 1]
    inputs = replace(inputs, ids=ids, mask_1L=mx.ones((1, len(ids)), mx.int32))
    with pruned(model, "uniform", keep_ratio=0.25) as report:
        _, odds = stock(model, inputs, prefill_step_size=4)
    kept = report.prompts[-1].kept_indices
    assert kept[0][-1] != 23  # the last of the image's rows is gone
    _, expected = reference(models, name, inputs, kept)
    np.testing.assert_allclose(odds[0], expected[0], rtol=0, atol=1e-4)


def test_what_is_no_image_is_refused(models):
    model = models("qwen2_5_vl")
    inputs = KINDS["qwen2_5_vl"].inputs(model, 1)
    ids = mx.array(inputs.ids)[None]
    with pruned(model, "norm", keep_ratio=0.5):
        with pytest.raises(UserError, match="only images"):
            model.get_input_embeddings(ids, None, pixel_values_videos=inputs.pixels)
        with pytest.raises(UserError, match="cached_image_features"):
            model.get_input_embeddings(ids, inputs.pixels, cached_image_features=inputs.pixels)


def test_whoever_forgets_that_rows_are_gone_gets_nan_and_no_answer(models):
    model = models("llava")
    inputs = KINDS["llava"].inputs(model, 1)
    ids, stock_call = mx.array(inputs.ids)[None], type(model.language_model).__call__
    with pruned(model, "norm", keep_ratio=0.5):
        x_1LD = model.get_input_embeddings(ids, inputs.pixels).inputs_embeds
        out = stock_call(model.language_model, ids, inputs_embeds=x_1LD)
    assert np.isnan(np.array(out.logits[0, -1])).all()


def test_a_cache_of_features_is_neither_read_nor_filled(models):
    class Untouched:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    model = models("qwen3_vl")
    inputs = KINDS["qwen3_vl"].inputs(model, 1)
    more = {"vision_cache": Untouched(), "_image_key": "a"}
    with pruned(model, "norm", keep_ratio=0.5) as report:
        model.get_input_embeddings(
            mx.array(inputs.ids)[None], inputs.pixels, **inputs.extra, **more
        )
    assert report.prompts[-1].kept == [12]


def test_mlx_vlms_server_is_given_pruned_prompts(models):
    """By its own function, which needs no more of it than the model and a cache."""
    from mlx_vlm.server.generation import ResponseGenerator
    from mlx_vlm.vision_cache import VisionFeatureCache

    model, vision_cache = models("qwen2_5_vl"), VisionFeatureCache()
    inputs = KINDS["qwen2_5_vl"].inputs(model, 1)
    server = SimpleNamespace(model=model, vision_cache=vision_cache)
    ids_1L = mx.array(inputs.ids)[None]
    request = {"input_ids": ids_1L, "pixel_values": inputs.pixels, "attention_mask": inputs.mask_1L}
    with pruned(model, "norm", keep_ratio=0.25) as report:
        ids, arguments = ResponseGenerator._gpu_embed(
            server, request | dict(inputs.extra), ["a.png"]
        )
    is_dropped = np.isnan(np.array(arguments["inputs_embeds"][0, :, 0]))
    assert ids.tolist() == [inputs.ids] and is_dropped.sum() == 24 - 6
    assert report.prompts[-1].kept == [6] and not len(vision_cache)


def test_a_thumbnail_in_a_batch_keeps_all_its_tokens_and_the_others_are_pruned(models):
    """keep_tokens is the most that an image keeps."""
    model = models("qwen2_5_vl")
    large, small = (framed_prompt(model, [grid]) for grid in ((4, 6), (2, 2)))
    expected = stock(model, small)[0]
    with pruned(model, "norm", keep_tokens=10) as report:
        alone = stock(model, large)[0]
        together = batch(model, [large, small, large])
    assert [prompt.kept for prompt in report.prompts] == [[10], [10], [4], [10]]
    assert [[token for token, _ in one] for one in together] == [alone, expected, alone]


def test_prompts_that_see_their_own_end_share_a_batch_only_when_equally_long(models):
    model = models("paligemma")
    inputs = KINDS["paligemma"].inputs(model)
    with pruned(model, "norm", keep_ratio=0.5):
        tokens, _ = stock(model, inputs)
        assert [[token for token, _ in one] for one in batch(model, [inputs] * 2)] == [tokens] * 2
        with pytest.raises(UserError, match="only when equally long"):
            batch(model, [inputs, longer(inputs)])


def longer(inputs: PreparedInputs) -> PreparedInputs:
    ids = [*inputs.ids, 7, 11]
    return replace(inputs, ids=ids, mask_1L=mx.ones((1, len(ids)), mx.int32))


def test_crops_that_nobody_tells_apart_take_a_ratio_only(models):
    model = models("idefics3")
    inputs = replace(KINDS["idefics3"].inputs(model, 1), extra={})
    with pruned(model, "norm", keep_tokens=3), pytest.raises(UserError, match="give keep_ratio"):
        stock(model, inputs)
    with pruned(model, "norm", keep_ratio=0.5) as report:
        stock(model, inputs)
    assert report.prompts[-1].kept == [4]


def test_families_that_grow_their_prompts_read_one_at_a_time(models):
    model = models("fastvlm")
    inputs = KINDS["fastvlm"].inputs(model)
    ids = mx.array([inputs.ids, inputs.ids])
    with pruned(model, "norm", keep_ratio=0.5), pytest.raises(UserError, match="one prompt at a"):
        model.get_input_embeddings(ids, inputs.pixels, mask=mx.ones_like(ids))


@pytest.mark.parametrize("page", ["README.md", "docs/mlx-vlm.md"])
def test_the_pages_block_runs(page, home, monkeypatch, capsys):
    (block,) = re.findall(r"```py\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(home)
    shutil.copy(home / "a.png", home / "photo.jpg")
    exec(block.replace("mlx-community/Qwen2.5-VL-3B-Instruct-4bit", "qwen2_5_vl"), {})
    assert "Visual tokens: 9 -> 2 (77.8% pruned)" in capsys.readouterr().out


def test_our_own_models_are_told_where_they_are_pruned():
    model, _ = load()
    with pytest.raises(UserError, match="ours take a pruner in generate"), pruned(model, "norm"):
        pass
