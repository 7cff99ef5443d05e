"""Promises of `pruned` about what is kept between requests: prefixes, pictures, several turns.

Shapes: L rows, V words.
"""

import gc
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune import load, pruned
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.prepared_inputs import PreparedInputs

from . import host_folders
from .host_models import KINDS, cached_models
from .host_reference import QWEN, TOKENS, reference, stock
from .test_pruned import by_view, several

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
FOLDERS = ["llava", *QWEN[1:]]


@pytest.fixture(scope="module")
def models():
    return cached_models()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    return {name: load(host_folders.checkpoint(name, folder)) for name in FOLDERS}


def streamed(model, processor, inputs: PreparedInputs, **options: Any) -> tuple[list[int], int]:
    """Tokens of mlx-vlm's `stream_generate`, and how many of the prompt's it had cached."""
    from mlx_vlm import stream_generate

    *_, last = stream_generate(
        model, processor, "", input_ids=mx.array(inputs.ids)[None], pixel_values=inputs.pixels,
        mask=inputs.mask_1L, max_tokens=TOKENS, temperature=0.0, **inputs.extra, **options,
    )  # fmt: skip
    return last.token_ids, last.cached_tokens


def longer(inputs: PreparedInputs, answer: list[int]) -> PreparedInputs:
    """The next turn of a conversation."""
    ids = [*inputs.ids, *answer, 7, 11]
    return replace(inputs, ids=ids, mask_1L=mx.ones((1, len(ids)), mx.int32))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_prefix_is_not_read_again_inside_nor_one_from_inside_outside(loaded, name):
    from mlx_vlm.generate import PromptCacheState

    model, processor = loaded[name]
    first, state = KINDS[name].inputs(model, 1), PromptCacheState()
    answer, _ = streamed(model, processor, first, prompt_cache_state=state)
    turn = longer(first, answer)
    whole, cached = streamed(model, processor, turn, prompt_cache_state=state)
    assert cached > 0  # stock mlx-vlm does read it again
    with pruned(model, "norm", keep_ratio=0.25):
        alone, _ = streamed(model, processor, turn)
        assert streamed(model, processor, turn, prompt_cache_state=state) == (alone, 0)
        again = longer(turn, alone)
        expected, _ = streamed(model, processor, again)
        assert streamed(model, processor, again, prompt_cache_state=state) == (expected, 0)
    stock_answer, _ = streamed(model, processor, again)
    assert streamed(model, processor, again, prompt_cache_state=state) == (stock_answer, 0)
    assert whole == streamed(model, processor, turn)[0]


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("name", FOLDERS)
def test_mlx_vlms_automatic_prefix_cache_finds_nothing_of_a_block(loaded, name, images):
    from mlx_vlm.apc import APCManager

    model, processor = loaded[name]
    inputs = KINDS[name].inputs(model, 1)
    if not images:
        ids = [3, 9, 4, 7, 11, 5, 8, 2, 30]
        inputs = PreparedInputs(ids, mx.ones((1, len(ids)), mx.int32))
    outside, inside = (APCManager(num_blocks=64, block_size=4) for _ in range(2))
    expected, _ = streamed(model, processor, inputs, apc_manager=outside)
    _, cached = streamed(model, processor, inputs, apc_manager=outside)
    assert outside.stats.hits == 1 and bool(cached) is not bool(images)  # stock does find it
    with pruned(model, "norm", keep_ratio=0.25):
        alone, _ = streamed(model, processor, inputs)
        for manager in (inside, inside, outside):
            assert streamed(model, processor, inputs, apc_manager=manager) == (alone, 0)
    assert streamed(model, processor, inputs, apc_manager=inside) == (expected, 0)
    assert (inside.stats.hits, outside.stats.hits) == (0, 1)


def test_no_two_requests_share_a_key_of_that_cache_whichever_their_blocks(models):
    """mlx-vlm keeps it on disk, too: a later block must not find an earlier one's rows."""
    model, keys = models("llava"), []
    gc.freeze()  # else all that was ever imported is gone through twenty times
    for _ in range(20):
        with pruned(model, "norm", keep_ratio=0.25):
            keys += [model.apc_key_dependencies() for _ in range(2)]
        gc.collect()  # so that the next block may lie where this one lay
    gc.unfreeze()
    assert len(set(keys)) == 40


def test_a_cache_filled_inside_is_refused_outside(models):
    from mlx_vlm.models.cache import make_prompt_cache

    model = models("llava")
    inputs, cache = KINDS["llava"].inputs(model, 1), make_prompt_cache(model.language_model)
    with pruned(model, "norm", keep_ratio=0.25):
        stock(model, inputs, prompt_cache=cache)
    with pytest.raises(UserError, match="filled inside"):
        stock(model, PreparedInputs([3, 4], mx.ones((1, 2), mx.int32)), prompt_cache=cache)


@pytest.mark.parametrize("name", ["llava", *QWEN])
def test_a_new_question_chooses_anew_without_the_tower(models, name, monkeypatch):
    from mlx_vlm_prune.hosts import tower_cache

    model = models(name)
    first = KINDS[name].inputs(model, several(name))
    other = longer(first, [40, 41, 42, 43])
    with pruned(model, "mmtok", keep_ratio=0.25) as report:
        stock(model, other)
    expected = report.prompts[-1].kept_indices
    encoded, real = [], tower_cache.encode_images

    def counted(*arguments: Any) -> Any:
        encoded.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(tower_cache, "encode_images", counted)
    with pruned(model, "mmtok", keep_ratio=0.25) as report:
        stock(model, first)
        tokens, odds = stock(model, other)
    assert len(encoded) == 1 and [prompt.tower_skipped for prompt in report.prompts] == [
        False,
        True,
    ]
    assert report.prompts[0].kept_indices != report.prompts[1].kept_indices == expected
    wanted, wanted_odds = reference(models, name, other, by_view(name, expected))
    assert tokens == wanted
    np.testing.assert_allclose(odds, wanted_odds, rtol=0, atol=1e-4)


def test_another_picture_of_the_same_shape_is_not_taken_for_the_first(models):
    model = models("llava")
    first = KINDS["llava"].inputs(model, 1)
    other = replace(first, pixels=first.pixels[:, :, ::-1])
    with pruned(model, "norm", keep_ratio=0.25) as report:
        stock(model, first)
        stock(model, other)
        stock(model, first)
    assert [prompt.tower_skipped for prompt in report.prompts] == [False, False, True]
