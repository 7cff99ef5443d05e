"""Promises of `with pruned(model, …)`: what mlx-vlm does with the model prunes, and only inside.

The reference is that of the hosts: the rows that stay and their positions by counting, and the
language model without a cache over the whole sequence.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_vlm_prune import generate, pruned
from mlx_vlm_prune.checkpoints.errors import UserError

from .host_models import KINDS, cached_models
from .host_reference import MROPE, reference, stock

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
ALONE = ("fastvlm", "llava_next")  # families whose ids say less than their rows
BATCHED = [name for name in KINDS if name not in (*ALONE, "paligemma")]


@pytest.fixture(scope="module")
def models() -> Callable[[str], Any]:
    return cached_models()


def several(name: str) -> int:
    """Images in a prompt."""
    return len(KINDS[name].tiles)


def by_view(name: str, kept_indices: list[list[int]]) -> list[list[int]]:
    """An image's tokens, picture by picture of its tiles."""
    grids, by_picture = iter(KINDS[name].grids), []
    for tiles, index in zip(KINDS[name].tiles, kept_indices, strict=False):
        begin = 0
        for h, w in (next(grids) for _ in range(tiles)):
            by_picture.append([i - begin for i in index if begin <= i < begin + h * w])
            begin += h * w
    return by_picture


def held(model: Any) -> list[Any]:
    """Everything a model and its classes hold, by identity."""
    return [
        (name, type(module), *({k: id(v) for k, v in d.items()} for d in
                               (vars(type(module)), vars(module), module)))
        for name, module in model.named_modules()
    ]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_pruned_answer_is_that_of_the_short_sequence_without_a_cache(models, name):
    """The prompt read in chunks, whole, and in mlx-vlm's own steps."""
    model = models(name)
    for images in range(1, several(name) + 1):
        inputs = KINDS[name].inputs(model, images)
        for spec, ratio, step in (
            ("vispruner", 0.25, 3), ("divprune", 0.5, None), ("random", 0.7, 2048), ("norm", 0.5, 3)
        ):  # fmt: skip
            with pruned(model, spec, keep_ratio=ratio) as report:
                tokens, odds = stock(model, inputs, prefill_step_size=step)
            kept = by_view(name, report.prompts[-1].kept_indices)
            expected, expected_odds = reference(models, name, inputs, kept)
            assert tokens == expected
            np.testing.assert_allclose(odds, expected_odds, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "projector"),
    [
        ("llava", "multi_modal_projector.linear_2.bias"),
        ("gemma3", "multi_modal_projector.mm_input_projection_weight"),
    ],
)
def test_rows_that_a_broken_projector_makes_nan_are_not_taken_for_those_that_are_gone(
    name, projector
):
    model = KINDS[name].make()
    sound = dict(tree_flatten(model.parameters()))[projector]
    broken = mx.where(mx.arange(sound.shape[-1]) % 2 == 0, mx.nan, mx.inf) * mx.ones_like(sound)
    model.load_weights([(projector, broken)], strict=False)
    with pruned(model, "uniform", keep_ratio=0.5):
        _, odds = stock(model, KINDS[name].inputs(model, 1))
    assert np.isnan(odds).all()


@pytest.mark.parametrize("budget", [{"keep_ratio": 1.0}, {"keep_tokens": 99}], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_with_all_tokens_it_is_the_stock_model_bit_for_bit(models, name, budget):
    model, inputs = models(name), KINDS[name].inputs(models(name))
    expected, expected_odds = stock(model, inputs)
    with pruned(model, "vispruner", **budget) as report:
        tokens, odds = stock(model, inputs)
    assert report.kept == report.total > 0
    assert tokens == expected
    np.testing.assert_array_equal(odds, expected_odds)


@pytest.mark.parametrize("name", KINDS)
def test_afterwards_the_model_is_as_it_was_bit_for_bit(models, name):
    model, inputs = models(name), KINDS[name].inputs(models(name))
    odds, before = stock(model, inputs)[1], held(model)
    with pruned(model, "vispruner", keep_ratio=0.25):
        stock(model, inputs)
    assert held(model) == before
    np.testing.assert_array_equal(stock(model, inputs)[1], odds)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_an_exception_inside_leaves_nothing_either(models, name):
    model, inputs = models(name), KINDS[name].inputs(models(name))
    before = held(model)
    with pytest.raises(ZeroDivisionError), pruned(model, "norm", keep_ratio=0.25):
        stock(model, inputs)
        _ = 1 / 0
    assert held(model) == before
    ids_1L, computed = mx.array(inputs.ids)[None], {"inputs_embeds": mx.zeros((1, 1, 1))}
    with pytest.raises(UserError, match="leave out inputs_embeds: a model"), pruned(model, "norm"):
        model.get_input_embeddings(ids_1L, inputs.pixels, **computed)
    assert held(model) == before


@pytest.mark.parametrize("name", MROPE)
def test_positions_counted_anew_would_not_pass(models, name):
    """The control: the same rows, at positions without gaps."""
    model, inputs = models(name), KINDS[name].inputs(models(name))
    with pruned(model, "vispruner", keep_ratio=0.25, positions="renumber") as report:
        _, odds = stock(model, inputs)
    kept = by_view(name, report.prompts[-1].kept_indices)
    assert np.abs(odds - reference(models, name, inputs, kept)[1]).max() > 1e-2
    expected = reference(models, name, inputs, kept, "renumber")[1]
    np.testing.assert_allclose(odds, expected, rtol=0, atol=1e-4)


def test_a_model_is_not_pruned_twice_at_once(models):
    model = models("llava")
    before = held(model)
    with pruned(model, "norm", keep_ratio=0.25):
        inside = held(model)
        with (
            pytest.raises(UserError, match="being pruned already"),
            pruned(model, "norm", keep_ratio=0.5),
        ):
            pass
        assert held(model) == inside
        with pytest.raises(UserError, match="being pruned already"):
            generate(model, None, "w7 w9")
    assert held(model) == before


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"keep_ratio": 0.5, "keep_tokens": 4}, "not both"),
        ({"keep_ratio": 1.5}, "above 0 and at most 1"),
        ({"keep_tokens": 0}, "it must be a whole number, at least 1"),
        ({"keep_tokens": 1.5}, "it must be a whole number, at least 1"),
        ({"keep_ratio": "half"}, "it must be above 0 and at most 1"),
        ({"keep_tokens": np.array([3, 4])}, "it must be a whole number, at least 1"),
        ({"pruner": 5}, "pruner is 5; it must be a name"),
        ({"pruner": "cls_attention:layer=9"}, "there are layers 0 to 2"),
        ({"positions": "keep"}, "counts the rows"),
        ({"positions": "foo"}, "it is keep or renumber"),
        ({"pruner": "downsample"}, "it makes the pixels fewer"),
        ({"pruner": "fastv+restore"}, "share no mask"),
        ({"pruner": "nonsuch"}, "no pruner is called"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_touched(models, options, sentence):
    model = models("llava")
    before = held(model)
    with pytest.raises(UserError, match=sentence), pruned(model, **options):
        pass
    assert held(model) == before
