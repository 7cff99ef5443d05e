"""Promises about mlx-vlm's models: fewer visual tokens, and all else as it would have been."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.prepared_inputs import PreparedInputs
from mlx_vlm_prune.pruners import METHODS, Stage

from . import host_models
from .host_models import IMAGE, KINDS, START, cached_models
from .host_reference import (
    MROPE,
    decoded,
    encoded,
    indices,
    kept,
    let_norm_choose,
    prompt,
    reduced,
    reference,
    stock,
)

OF_TOWERS = [
    name
    for name, method in METHODS.items()
    if method.stage in (Stage.FEATURES, Stage.PROJECTED) and not method.learned and name != "none"
]


@pytest.fixture(scope="module")
def models():
    return cached_models()


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_with_all_tokens_it_is_the_stock_model_bit_for_bit(models, name, images):
    if images > len(KINDS[name].tiles):
        pytest.skip(f"{name} reads one image")
    model, inputs = models(name), prompt(models, name, images)
    for spec in ("none", "vispruner"):
        tokens, odds = decoded(model, reduced(model, inputs, spec, 1.0).arguments)
        expected, expected_odds = stock(model, inputs)
        assert tokens == expected
        np.testing.assert_array_equal(odds, expected_odds)


@pytest.mark.parametrize("step", [3, None, 2048], ids=["chunked", "whole", "default"])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_a_pruned_answer_is_that_of_the_short_sequence_without_a_cache(models, name, images, step):
    if images > len(KINDS[name].tiles):
        pytest.skip(f"{name} reads one image")
    model, inputs = models(name), prompt(models, name, images)
    for spec, ratio in (("vispruner", 0.25), ("divprune", 0.5), ("random", 0.3)):
        pruned = reduced(model, inputs, spec, ratio)
        tokens, odds = decoded(model, pruned.arguments, prefill_step_size=step)
        expected, expected_odds = reference(models, name, inputs, indices(pruned))
        assert tokens == expected
        np.testing.assert_allclose(odds, expected_odds, rtol=0, atol=1e-4)
        words = [token for token in inputs.ids if token not in (IMAGE, -200)]
        assert pruned.length == len(words) + sum(map(len, indices(pruned)))


@pytest.mark.parametrize("name", MROPE)
def test_renumbered_positions_count_what_is_left(models, name):
    model, inputs = models(name), prompt(models, name)
    pruned = reduced(model, inputs, "norm", 0.5, "renumber")
    assert pruned.positions == "renumber"
    _, odds = decoded(model, pruned.arguments, prefill_step_size=4)
    _, expected = reference(models, name, inputs, indices(pruned), "renumber")
    np.testing.assert_allclose(odds, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("wrong", ["position_ids", "rope_deltas"])
@pytest.mark.parametrize("name", MROPE)
def test_wrong_positions_would_not_pass(models, name, wrong):
    """The control: positions as mlx-vlm derives them from the short ids, or its old delta."""
    model, inputs = models(name), prompt(models, name)
    pruned = reduced(model, inputs, "vispruner", 0.25)
    short = mx.arange(pruned.length)[None, None]
    as_before = pruned.arguments["rope_deltas"] - (len(inputs.ids) - pruned.length)
    value = {
        "position_ids": mx.broadcast_to(short, (3, 1, pruned.length)),
        "rope_deltas": as_before,
    }
    _, odds = decoded(model, pruned.arguments | {wrong: value[wrong]})
    _, expected = reference(models, name, inputs, indices(pruned))
    assert np.abs(odds - expected).max() > 1e-2


def test_deepstack_left_out_would_not_pass(models):
    model, inputs = models("qwen3_vl"), prompt(models, "qwen3_vl")
    pruned = reduced(model, inputs, "vispruner", 0.25)
    without = {k: v for k, v in pruned.arguments.items() if k != "deepstack_visual_embeds"}
    _, odds = decoded(model, without)
    _, expected = reference(models, "qwen3_vl", inputs, indices(pruned))
    assert np.abs(odds - expected).max() > 1e-2


@pytest.mark.parametrize("name", MROPE)
def test_a_kept_token_of_a_grid_keeps_its_three_positions(models, name, monkeypatch):
    """Two rows of three tokens between the words 9 and 5, of which 1, 3 and 5 stay."""
    model = models(name)
    inputs = PreparedInputs(
        [9, START, *[IMAGE] * 6, host_models.END, 5], mx.ones((1, 10), mx.int32),
        mx.random.normal((24, 3 * 2 * 14 * 14)), 1, {"image_grid_thw": mx.array([[1, 4, 6]])},
    )  # fmt: skip
    let_norm_choose(monkeypatch, lambda signals, K: kept([1, 3, 5]))
    pruned = reduced(model, inputs, "norm", 0.5)
    assert pruned.arguments["input_ids"].tolist() == [[9, START, *[IMAGE] * 3, host_models.END, 5]]
    assert pruned.arguments["position_ids"][:, 0].tolist() == [
        [0, 1, 2, 2, 2, 5, 6],  # time
        [0, 1, 2, 3, 3, 5, 6],  # row
        [0, 1, 3, 2, 4, 5, 6],  # column
    ]
    assert pruned.arguments["rope_deltas"].tolist() == [[0]]  # row 7 is position 7


def test_what_deepstack_adds_is_cut_to_the_same_tokens(models):
    model, inputs = models("qwen3_vl"), prompt(models, "qwen3_vl")
    pruned = reduced(model, inputs, "norm", 0.25)
    _, deep = KINDS["qwen3_vl"].full(model, inputs)
    for layer, ours in enumerate(pruned.arguments["deepstack_visual_embeds"]):
        expected = [np.array(y[layer])[k] for y, k in zip(deep, indices(pruned), strict=True)]
        np.testing.assert_array_equal(np.array(ours), np.concatenate(expected))


def test_with_several_images_every_token_takes_the_place_of_its_own_image(models, monkeypatch):
    """Words 3 9 4, sixteen rows, words 7 11, sixteen rows, words 5 8 2 30."""
    model, inputs = models("llava"), prompt(models, "llava")
    chosen = iter([[2, 9], [0, 15]])
    let_norm_choose(monkeypatch, lambda signals, K: kept(next(chosen)))
    pruned = reduced(model, inputs, "norm", 0.125)
    assert pruned.arguments["input_ids"].tolist() == [
        [3, 9, 4, IMAGE, IMAGE, 7, 11, IMAGE, IMAGE, 5, 8, 2, 30]
    ]
    (first, second), _ = KINDS["llava"].full(model, inputs)
    expected = [first[2], first[9], second[0], second[15]]
    ours = np.array(pruned.arguments["cached_image_features"][0])
    np.testing.assert_allclose(ours, np.stack([np.array(x) for x in expected]), atol=1e-5)


@pytest.mark.parametrize("method", OF_TOWERS)
@pytest.mark.parametrize("name", KINDS)
def test_every_method_of_the_towers_end_leaves_as_many_as_it_is_told(models, name, method):
    model, inputs = models(name), prompt(models, name)
    if method == "two_scales" or (method == "zoo_prune" and host_of(model).why_no_probe):
        with pytest.raises(UserError, match=f"^{method} cannot prune a "):
            reduced(model, inputs, method, 0.5)
        return
    pruned = reduced(model, inputs, method, 0.5)
    sizes = [view.signals.x_BND.shape[1] for view in pruned.views]
    assert [one.slots for one in pruned.trace.steps[-1].reductions] == [n // 2 for n in sizes]
    _, odds = decoded(model, pruned.arguments)
    assert np.isfinite(odds).all()


@pytest.mark.parametrize("name", KINDS)
def test_merged_tokens_are_mixed_before_the_projector(models, name):
    model, inputs = models(name), prompt(models, name, 1)
    pruned = reduced(model, inputs, "avgpool", 0.25)
    whole = [view.signals.x_BND for view in encoded(model, inputs, "none")]
    pairs = zip(pruned.trace.steps[-1].reductions, whole, strict=True)
    expected = [host_of(model).project(one.apply(x))[0] for one, x in pairs]
    ours = pruned.arguments["cached_image_features"]
    ours = ours[0] if isinstance(ours, list) or ours.ndim == 3 else ours
    np.testing.assert_allclose(np.array(ours), np.concatenate(expected), atol=1e-5)
