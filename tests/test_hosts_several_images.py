"""Promises about several images where mlx-vlm itself reads one, or puts words in wrong places.

The reference is the language model without a cache, over words and kept tokens in their order.

Shapes: L rows, D features.
"""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from mlx_vlm_prune import generate, load, pruned
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.prefill import prompt_cache
from mlx_vlm_prune.hosts.prepared_inputs import PreparedInputs

from . import host_folders, stock_folders
from .host_models import IMAGE, KINDS, WORDS, cached_models, noise
from .host_reference import TOKENS, decoded, forward, indices, reduced, stock, table
from .test_hosts_restore import SPEC, biases_of

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
FAMILIES = ["fastvlm", "llava_next", "paligemma"]


@pytest.fixture(scope="module")
def models():
    return cached_models()


def two_images(name: str, model: Any) -> PreparedInputs:
    """Words, an image, words, an image, words; PaliGemma's images stand first. LLaVA-NeXT's second
    has one crop less, which zeros fill up."""
    first, between, last = WORDS
    if name == "paligemma":
        ids = [IMAGE] * 32 + [*first, *last]
        pixels = noise().normal(size=(2, 3, 56, 56))
    elif name == "fastvlm":
        mark = model.config.image_token_index
        ids = [*first, mark, *between, mark, *last]
        pixels = noise().normal(size=(2, 3, 256, 256))
    else:
        ids = [*first, *[IMAGE] * 40, *between, *[IMAGE] * 24, *last]
        pixels = noise().normal(size=(2, 3, 3, 56, 56))
        pixels[1, 2] = 0
    pixels = mx.array(pixels.astype(np.float32))
    return PreparedInputs(ids, mx.ones((1, len(ids)), mx.int32), pixels, 2)


def embeddings(name: str, model: Any, inputs: PreparedInputs) -> list[mx.array]:
    """Of every picture, by the stock parts, one picture at a time."""
    pixels = inputs.pixels
    if name == "llava_next":
        pixels = mx.concatenate([pixels[0], pixels[1, :2]])
    full = KINDS["llava" if name == "llava_next" else name].full
    return [
        full(model, replace(inputs, pixels=pixels[i : i + 1]))[0][0] for i in range(len(pixels))
    ]


def expected(name: str, model: Any, inputs: PreparedInputs, kept: list[list[int]], biases=None):
    x = [y[mx.array(index)] for y, index in zip(embeddings(name, model, inputs), kept, strict=True)]
    by_image = [mx.concatenate(x[:3]), mx.concatenate(x[3:])] if name == "llava_next" else x
    first, between, last = (table(model)(mx.array(words)) for words in WORDS)
    parts = [(first, 0), (by_image[0], 1), (between, 0), (by_image[1], 1), (last, 0)]
    if name == "paligemma":
        parts = [(by_image[0], 1), (by_image[1], 1), (first, 0), (last, 0)]
    x_LD = mx.concatenate([part for part, _ in parts])
    visual = [bool(is_image) for part, is_image in parts for _ in range(len(part))]
    tokens, odds = [], []
    prompt = len(visual)
    for _ in range(TOKENS):
        if name == "paligemma":  # the prompt sees all of itself
            L, at = len(x_LD), mx.arange(len(x_LD))
            mask = ((at < prompt) | (at <= at[:, None]))[None, None]
            ids = mx.zeros((1, L), mx.int32)
            logits_V = model.language_model(ids, inputs_embeds=x_LD[None], mask=mask).logits[0, -1]
        else:
            logits_V = forward(model, name, x_LD, [], visual, [], biases)
        odds.append(np.array(logits_V - mx.logsumexp(logits_V)))
        tokens.append(int(odds[-1].argmax()))
        x_LD, visual = mx.concatenate([x_LD, table(model)(mx.array(tokens[-1:]))]), [*visual, False]
    return tokens, np.stack(odds)


@pytest.mark.parametrize("step", [3, 2048])
@pytest.mark.parametrize(("spec", "ratio"), [("vispruner", 0.25), ("divprune", 0.7), ("none", 1.0)])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_image_stands_among_its_words(models, name, spec, ratio, step):
    model = models(name)
    inputs = two_images(name, model)
    short = reduced(model, inputs, spec, ratio)
    tokens, odds = decoded(model, short.arguments, prefill_step_size=step)
    kept = (
        [index for index in indices(short)]
        if spec != "none"
        else [list(range(len(x))) for x in embeddings(name, model, inputs)]
    )
    wanted, wanted_odds = expected(name, model, inputs, kept)
    assert tokens == wanted
    np.testing.assert_allclose(odds, wanted_odds, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_so_it_does_in_a_block(models, name):
    model = models(name)
    inputs = two_images(name, model)
    if name == "llava_next":  # as its processor says how many images there are
        inputs = replace(inputs, extra={"image_sizes": mx.array([[112, 56], [56, 56]])})
    short = reduced(model, inputs, "divprune", 0.5)
    wanted = decoded(model, short.arguments)
    with pruned(model, "divprune", keep_ratio=0.5) as report:
        tokens, odds = stock(model, inputs)
    assert len(report.prompts[0].kept_indices) == 2
    assert tokens == wanted[0]
    np.testing.assert_allclose(odds, wanted[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["fastvlm", "llava_next"])
def test_every_image_gets_the_attention_that_restore_gives_it(models, name):
    model = models(name)
    inputs = two_images(name, model)
    short = reduced(model, inputs, SPEC, 0.3)
    biases = biases_of(model, inputs, indices(short))
    cache = prompt_cache(host_of(model), short)
    tokens, odds = decoded(model, short.arguments, prompt_cache=cache)
    wanted, wanted_odds = expected(name, model, inputs, indices(short), biases)
    assert tokens == wanted
    np.testing.assert_allclose(odds, wanted_odds, rtol=0, atol=1e-4)


def test_images_that_could_not_be_told_apart_are_refused(models):
    for name, sentence in (
        ("fastvlm", "needs a word between two images"),
        ("paligemma", "stand before its words"),
    ):
        model = models(name)
        inputs = two_images(name, model)
        mark = -200 if name == "fastvlm" else IMAGE
        marks = [token for token in inputs.ids if token == mark]
        words = [token for token in inputs.ids if token != mark]
        ids = [words[0], *marks, *words[1:]]
        with pytest.raises(UserError, match=sentence):
            reduced(model, replace(inputs, ids=ids), "norm", 0.5)


def test_llava_nexts_images_need_words_between_all_or_none(models):
    model = models("llava_next")
    inputs = two_images("llava_next", model)
    adjacent = replace(inputs, ids=[3, *[IMAGE] * 64, 5])
    short = reduced(model, adjacent, "norm", 0.5)  # 3 and 2 blocks of 8 rows
    assert short.arguments["input_ids"].tolist() == [[3, *[IMAGE] * 5, 5]]
    assert short.arguments["cached_image_features"].shape == (5, 8, 64)
    three = replace(inputs, ids=[3, *[IMAGE] * 9, 5, *[IMAGE] * 9, 5, *[IMAGE] * 9])
    with pytest.raises(UserError, match="in 3 places for 2 images"):
        reduced(model, three, "norm", 0.5)


@pytest.mark.parametrize("family", ["llava_next", "paligemma"])
def test_the_main_job_reads_two_pictures(tmp_path, family):
    model, processor = load(stock_folders.checkpoint(family, tmp_path))
    pictures = [host_folders.picture(tmp_path, f"{n}.png", n, 60) for n in (120, 60)]
    answer = generate(
        model, processor, "w7 w9", pictures, pruner="divprune", keep_ratio=0.5, max_tokens=4
    )
    assert len(answer.kept_indices) == 2 and len(answer.token_ids) >= 1
    assert answer.visual_tokens_kept < answer.visual_tokens
    assert answer.overlay().size[0] > 200
    one = [
        generate(
            model, processor, "w7 w9", picture, pruner="divprune", keep_ratio=0.5, max_tokens=1
        )
        for picture in pictures
    ]
    assert answer.kept_indices == [each.kept_indices[0] for each in one]
