"""Clips in blocks of `pruned()`: mlx-vlm's own functions prune one, refuse it, or read it whole."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune import UserError, attach, pruned

from .host_models import cached_models
from .host_reference import reduced, stock
from .test_hosts_video import FAMILIES, SPECS, as_mlx_vlm, clip, expected_answer

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.fixture(scope="module")
def models():
    return cached_models()


@pytest.mark.parametrize("name", FAMILIES)
def test_in_a_block_mlx_vlms_own_functions_prune_a_clip(models, name):
    model, inputs = models(name), clip(name)
    expected, expected_odds = stock(model, as_mlx_vlm(inputs))
    with pruned(model, "divprune", keep_ratio=1.0):
        tokens, odds = stock(model, as_mlx_vlm(inputs))
    assert tokens == expected
    np.testing.assert_array_equal(odds, expected_odds)
    for spec, ratio in zip(SPECS, (0.25, 0.5, 0.4, 0.5), strict=True):
        with pruned(model, spec, keep_ratio=ratio) as report:
            tokens, odds = stock(model, as_mlx_vlm(inputs))
        assert (report.total, report.kept) == (12, int(12 * ratio))
        (reduction,) = reduced(model, inputs, spec, ratio).trace.steps[-1].reductions
        expected, expected_odds = expected_answer(models, name, inputs, reduction)
        assert tokens == expected
        np.testing.assert_allclose(odds, expected_odds, rtol=0, atol=1e-4)


def test_a_clip_in_the_place_of_pictures_is_pruned_too_and_by_a_number_of_tokens(models):
    model, inputs = models("qwen2_5_vl"), clip("qwen2_5_vl")
    answers = []
    for given in (inputs, as_mlx_vlm(inputs)):
        with pruned(model, "divprune", keep_tokens=5) as report:
            answers.append(stock(model, given))
        assert (report.total, report.kept) == (12, 5)
    assert answers[0][0] == answers[1][0]
    np.testing.assert_array_equal(answers[0][1], answers[1][1])


def test_several_clips_and_clips_in_a_batch_are_refused_or_read_whole(models):
    model, inputs = models("qwen2_5_vl"), as_mlx_vlm(clip("qwen2_5_vl"))
    grids = mx.concatenate([inputs.extra["video_grid_thw"]] * 2)
    pixels = mx.concatenate([inputs.extra["pixel_values_videos"]] * 2)
    several = {"video_grid_thw": grids, "pixel_values_videos": pixels}
    in_place = {"video_grid_thw": grids, "pixel_values": pixels}
    one, two = (mx.array([inputs.ids] * B) for B in (1, 2))
    ids_of_two = mx.array([inputs.ids + inputs.ids])
    for ids, extra in ((ids_of_two, several), (ids_of_two, in_place), (two, several)):
        with pruned(model, "norm"), pytest.raises(UserError, match="or one clip alone, are pruned"):
            model.get_input_embeddings(ids, **extra)
    expected = model.get_input_embeddings(two, **several).inputs_embeds
    _, detach = attach(model, "norm", allow_videos=True)
    features = model.get_input_embeddings(two, **several)
    words = model.get_input_embeddings(one[:, :3], video_grid_thw=grids)  # a later turn's
    detach()
    np.testing.assert_array_equal(features.inputs_embeds, expected)
    assert words.inputs_embeds.shape[1] == 3


def test_in_a_block_a_clip_that_cannot_be_pruned_is_refused_or_read_whole(models):
    model, inputs = models("qwen2_5_vl"), as_mlx_vlm(clip("qwen2_5_vl"))
    expected, expected_odds = stock(model, inputs)
    with pruned(model, "uniform"), pytest.raises(UserError, match="uniform cannot prune a clip"):
        stock(model, inputs)
    sounds = replace(inputs, extra={**inputs.extra, "input_features": mx.zeros((1, 2))})
    with pruned(model, "norm"), pytest.raises(UserError, match="or one clip alone, are pruned"):
        stock(model, sounds)
    _, detach = attach(model, "uniform", allow_videos=True)
    tokens, odds = stock(model, inputs)
    detach()
    assert tokens == expected
    np.testing.assert_array_equal(odds, expected_odds)
