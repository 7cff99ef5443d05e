"""Promises about what the families of 2026 have of their own; all else is in the other tests.

Shapes: L rows of the prompt.
"""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from mlx_vlm_prune import pruned
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.prepared_inputs import PreparedInputs
from mlx_vlm_prune.hosts.tower_cache import images_key

from . import recent_host_models as recent
from .host_models import IMAGE, KINDS, START, cached_models
from .host_reference import (
    HYBRID,
    TOKENS,
    decoded,
    embed,
    indices,
    prompt,
    reduced,
    reference,
    rows,
    stock,
)


@pytest.fixture(scope="module")
def models():
    return cached_models()


@pytest.mark.parametrize("name", HYBRID)
def test_a_state_that_had_read_the_dropped_rows_would_not_pass(models, name):
    """The control: the recurrent layers' states of the whole prompt, before the first answer."""
    from mlx_vlm.models.cache import ArraysCache, make_prompt_cache

    model = models(name)
    inputs = prompt(models, name, 1)
    whole, short = (reduced(model, inputs, "divprune", ratio) for ratio in (1.0, 0.25))
    caches = []
    for one in (whole, short):
        caches.append(make_prompt_cache(model.language_model))
        with host_of(model).preserve_state():
            decoded(model, one.arguments, prompt_cache=caches[-1])
    states = [[c.state for c in cache if isinstance(c, ArraysCache)] for cache in caches]
    assert len(states[0]) == 2
    for full, left in zip(*states, strict=True):
        assert np.abs(np.array(full[1]) - np.array(left[1])).max() > 1e-3


def of_two_shapes(model: Any) -> PreparedInputs:
    """Two pictures of six tokens, one wide and one high, as Gemma 4's processor gives them."""
    rng, shapes = np.random.default_rng(3), [(24, 36), (36, 24)]
    pixels = [mx.array(rng.uniform(size=(3, *s)).astype(np.float32)) for s in shapes]
    return replace(KINDS["gemma4"].inputs(model), pixels=pixels)


def test_gemma4s_pictures_may_have_any_shape(models):
    model = models("gemma4")
    inputs = of_two_shapes(model)
    tokens, odds = decoded(model, reduced(model, inputs, "vispruner", 1.0).arguments)
    expected, expected_odds = stock(model, inputs)
    assert tokens == expected
    np.testing.assert_array_equal(odds, expected_odds)
    short = reduced(model, inputs, "vispruner", 0.5)
    assert [view.signals.grid for view in short.views] == [(2, 3), (3, 2)]
    full = [model.embed_vision(model.vision_tower([each]))[0] for each in inputs.pixels]
    kept = [np.array(x)[index] for x, index in zip(full, indices(short), strict=True)]
    ours = np.array(short.arguments["cached_image_features"][0])
    np.testing.assert_allclose(ours, np.concatenate(kept), atol=1e-5)
    with pruned(model, "vispruner", keep_ratio=0.5) as report:
        answered = stock(model, inputs)
    assert report.prompts[0].kept_indices == indices(short)
    expected, expected_odds = decoded(model, short.arguments)
    assert answered[0] == expected
    np.testing.assert_allclose(answered[1], expected_odds, rtol=0, atol=1e-4)


def test_gemma4s_odd_pictures_are_refused(models):
    model = models("gemma4")
    inputs = KINDS["gemma4"].inputs(model)
    with pytest.raises(UserError, match="12 must divide"):
        reduced(model, replace(inputs, pixels=inputs.pixels[..., :-1]), "norm", 0.5)
    packed = replace(inputs, extra={"image_position_ids": mx.zeros((2, 54, 2))})
    with pytest.raises(UserError, match="mlx-vlm's own gives pictures"):
        reduced(model, packed, "norm", 0.5)


@pytest.fixture(scope="module")
def seeing():
    """A Gemma 4 in which the rows of an image see one another."""
    return recent.gemma4(use_bidirectional_attention="vision", hidden_size_per_layer_input=0)


def without_a_cache(model: Any, inputs: PreparedInputs, kept: list[list[int]]):
    """Each step over all rows; those of an image see one another."""
    embeds, _ = KINDS["gemma4"].full(model, inputs)
    x_LD, _, visual = rows(model, "gemma4", inputs, kept, embeds)
    odds, tokens = [], []
    for _ in range(TOKENS):
        types = mx.array([visual]).astype(mx.int32)
        ids = mx.zeros((1, len(visual)), mx.int32)
        out = model.language_model(ids, inputs_embeds=x_LD[None], mm_token_type_ids=types)
        logits_V = out.logits[0, -1]
        odds.append(np.array(logits_V - mx.logsumexp(logits_V)))
        tokens.append(int(odds[-1].argmax()))
        x_LD = mx.concatenate([x_LD, embed(model, "gemma4", tokens[-1])])
        visual = [*visual, False]
    return tokens, np.stack(odds)


@pytest.mark.parametrize("step", [3, 2048])
def test_rows_of_an_image_that_see_one_another_still_do(seeing, step):
    inputs = KINDS["gemma4"].inputs(seeing)
    expected, expected_odds = stock(seeing, inputs)
    tokens, odds = decoded(seeing, reduced(seeing, inputs, "divprune", 1.0).arguments)
    assert tokens == expected
    np.testing.assert_array_equal(odds, expected_odds)
    short = reduced(seeing, inputs, "divprune", 0.5)
    answered = [decoded(seeing, short.arguments, prefill_step_size=step)]
    with pruned(seeing, "divprune", keep_ratio=0.5):
        answered.append(stock(seeing, inputs, prefill_step_size=step))
    expected, expected_odds = without_a_cache(seeing, inputs, indices(short))
    for tokens, odds in answered:
        assert tokens == expected
        np.testing.assert_allclose(odds, expected_odds, rtol=0, atol=1e-4)
    short.arguments.pop("mm_token_type_ids")
    blind = decoded(seeing, short.arguments)[1]
    assert np.abs(blind - expected_odds).max() > 1e-3  # so it matters


def test_lfm2s_views_are_told_apart_by_the_words_between_them(models):
    """Without the number of tiles, as mlx-vlm's processor leaves it out."""
    model = models("lfm2_vl")
    inputs = KINDS["lfm2_vl"].inputs(model)
    extra = {n: x for n, x in inputs.extra.items() if n != "num_patches_list"}
    with pruned(model, "norm", keep_tokens=4) as report:
        tokens, odds = stock(model, replace(inputs, extra=extra))
    assert [prompt.total for prompt in report.prompts] == [[8, 3]]
    assert [prompt.kept for prompt in report.prompts] == [[4, 3]]
    first, second = report.prompts[0].kept_indices
    by_view = [[i for i in first if i < 4], [i - 4 for i in first if i >= 4], second]
    expected, expected_odds = reference(models, "lfm2_vl", inputs, by_view)
    assert tokens == expected
    np.testing.assert_allclose(odds, expected_odds, rtol=0, atol=1e-4)


def test_the_same_patches_in_another_shape_are_another_picture(models):
    inputs = KINDS["lfm2_vl"].inputs(models("lfm2_vl"), 1)
    turned = {**inputs.extra, "spatial_shapes": mx.array([[2, 8], [4, 4]])}
    assert images_key(inputs) != images_key(replace(inputs, extra=turned))


def test_lfm2s_odd_views_are_refused(models):
    model = models("lfm2_vl")
    inputs = KINDS["lfm2_vl"].inputs(model, 1)
    odd = {**inputs.extra, "spatial_shapes": mx.array([[3, 4], [4, 4]])}
    with pytest.raises(UserError, match="3 x 4 patches; 2 must divide both"):
        reduced(model, replace(inputs, extra=odd), "norm", 0.5)


def test_onevisions_new_lines_stay_with_all_tokens_and_leave_with_the_first(models):
    model = models("llava_onevision")
    inputs = KINDS["llava_onevision"].inputs(model, 1)
    whole, short = (reduced(model, inputs, "norm", ratio) for ratio in (1.0, 0.9))
    assert whole.arguments["input_ids"].tolist()[0] == inputs.ids
    assert inputs.ids.count(IMAGE) == 16 + 6 * 5
    assert short.arguments["input_ids"].tolist()[0].count(IMAGE) == 14 + 21


def test_onevisions_mosaic_has_each_tiles_attention_in_its_place(models):
    """Of an image of 2 x 1 tiles, 8 x 4 tokens, of which a row above and below is margin."""
    from .host_reference import encoded

    model = models("llava_onevision")
    inputs = KINDS["llava_onevision"].inputs(model, 1)
    alone = replace(
        inputs, pixels=inputs.pixels[0, :3], extra={"image_sizes": mx.array([[56, 56]])}
    )
    _, joined = encoded(model, inputs, "cls_attention")
    assert joined.signals.grid == (6, 4)
    host = host_of(model)
    *_, states = model.vision_tower(alone.pixels.transpose(0, 2, 3, 1), output_hidden_states=True)
    tiles = host.signals(states[-1], {"cls_attention": -1}, states, grid=(4, 4))
    rows_84 = np.array(tiles.cls_attention_BN[1:]).reshape(8, 4)
    np.testing.assert_allclose(
        np.array(joined.signals.cls_attention_BN[0]), rows_84[1:7].ravel(), rtol=1e-5
    )


def test_a_large_mosaic_is_made_smaller_as_mlx_vlm_does(models):
    """With room for one picture's tokens in place of nine."""
    model = recent.llava_onevision()
    model.config.vision_aspect_ratio = "anyres_max_1"
    pixels = mx.array(recent.noise().normal(size=(1, 5, 3, 56, 56)).astype(np.float32))
    ids = [3, *[IMAGE] * (16 + 4 * 5), 5]  # 8 x 8 become 4 x 4, with new lines
    extra = {"image_sizes": mx.array([[112, 112]])}
    inputs = PreparedInputs(ids, mx.ones((1, len(ids)), mx.int32), pixels, 1, extra)
    tokens, odds = decoded(model, reduced(model, inputs, "norm", 1.0).arguments)
    expected, expected_odds = stock(model, inputs)
    assert tokens == expected
    np.testing.assert_array_equal(odds, expected_odds)
    assert [v.signals.grid for v in reduced(model, inputs, "vispruner", 0.5).views] == [(4, 4)] * 2


def test_a_model_is_known_by_its_own_class_and_not_by_those_it_is_derived_from(models):
    assert host_of(models("qwen3_5_moe")).kind == "qwen3_5_moe"
    model = recent.qwen3_5()
    model.config.model_type = "qwen3_vl"
    with pytest.raises(UserError, match="a qwen3_5 model's config calls it a qwen3_vl model"):
        host_of(model)
    assert START in KINDS["qwen3_5"].inputs(model, 1).ids
