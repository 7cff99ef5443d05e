"""Promises of `pruned` about methods between the language model's layers.

What mlx-vlm answers in a block is what `generate` answers, which has a reference of its own.
"""

import gc

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from mlx_vlm_prune import generate, load, pruned
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.language_layers import ShiftedCache

from . import host_folders
from .host_models import KINDS, cached_models
from .host_reference import stock
from .test_hosts_deep import DEEP, answered
from .test_hosts_deep import pruned as read_through_cuts
from .test_pruned import held
from .test_pruned_tools import batch, prompts_of

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.fixture(scope="module")
def models():
    return cached_models()


@pytest.mark.parametrize(
    "spec", ["fastv", "divprune+vtw", "sparsevlm", "pact", "lookahead:layer=1"]
)
@pytest.mark.parametrize("name", DEEP)
def test_an_answer_in_a_block_is_that_of_our_own_path(models, name, spec):
    if name == "gemma3" and spec.startswith(("pact", "lookahead")):
        pytest.skip("windows of rows would cut repeated ones off")
    model = models(name)
    for positions, step in (("keep", 3), ("renumber", 2048)):  # in chunks, and at once
        inputs = KINDS[name].inputs(model)
        prompt = read_through_cuts(model, inputs, spec, 0.6, positions)
        expected, expected_odds = answered(model, prompt)
        before = held(model)
        with pruned(model, spec, keep_ratio=0.6, positions=positions) as report:
            for _ in range(2):  # caches of one request are not those of the next
                tokens, odds = stock(model, inputs, prefill_step_size=step)
                assert tokens == expected
                np.testing.assert_allclose(odds, expected_odds, rtol=0, atol=1e-4)
        assert held(model) == before
        assert 0 < report.kept < 0.7 * report.total
        runs = prompt.trace.layers(3)
        mean = sum(run["visual_tokens"] * (run["last"] - run["first"] + 1) for run in runs) / 3
        assert sum(report.prompts[0].kept) == pytest.approx(mean, abs=1)
        assert report.prompts[0].kept_indices == prompt.trace.layers(3)[-1]["kept_indices"]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_with_all_tokens_or_words_alone_it_is_the_stock_model_bit_for_bit(models, name):
    model = models(name)
    for images in (0, 2):
        inputs = KINDS[name].inputs(model, images) if images else prompts_of(model, name)[1]
        expected, expected_odds = stock(model, inputs)
        with pruned(model, "fastv", keep_ratio=1.0):
            tokens, odds = stock(model, inputs)
        assert tokens == expected
        np.testing.assert_array_equal(odds, expected_odds)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_batches_and_caches_that_forget_are_refused(models, name):
    model = models(name)
    inputs = KINDS[name].inputs(model)
    with pruned(model, "fastv", keep_ratio=0.5):
        with pytest.raises(UserError, match="no batch, no server, no max_kv_size"):
            stock(model, inputs, max_kv_size=64)
        with pytest.raises(UserError, match="no batch, no server, no max_kv_size"):
            batch(model, [KINDS[name].inputs(model, 1)] * 2)
        ids_BL = mx.array([inputs.ids] * 2)
        if name == "llava":
            pixels = mx.concatenate([inputs.pixels] * 2)
            with pytest.raises(UserError, match="fastv prunes one prompt at a time"):
                model.get_input_embeddings(ids_BL, pixels)


def test_a_prompt_is_forgotten_with_its_answer(models):
    """Its caches, views and pixels are GBs in a model that is attached for good."""
    model = models("llava")
    with pruned(model, "fastv", keep_ratio=0.5):
        stock(model, KINDS["llava"].inputs(model))
        gc.collect()
        assert type(model.language_model).state.through_cuts == []


def test_mlx_vlms_own_generate_answers_as_ours_does(tmp_path):
    from mlx_vlm import apply_chat_template
    from mlx_vlm import generate as theirs

    picture = host_folders.picture(tmp_path, "a.png", 80, 90)
    model, processor = load(host_folders.checkpoint("qwen2_5_vl", tmp_path))
    text = apply_chat_template(processor, model.config, "w7 w9", num_images=1)
    ours = generate(
        model, processor, "w7 w9", picture, pruner="fastv", keep_ratio=0.6, max_tokens=6
    )
    with pruned(model, "fastv", keep_ratio=0.6) as report:
        answer = theirs(model, processor, text, image=str(picture), max_tokens=6, temperature=0.0)
    assert answer.token_ids == ours.token_ids
    assert report.prompts[0].kept_indices == ours.kept_indices


def test_a_cache_that_is_ahead_stays_so_when_it_is_quantised():
    from mlx_vlm.models.cache import KVCache

    held = KVCache()
    held.update_and_fetch(*mx.random.normal((2, 1, 2, 5, 64)))
    ahead = ShiftedCache(held, 7)
    small = ahead.to_quantized(group_size=64, bits=8)
    assert (ahead.offset, small.offset, small.bits) == (12, 12, 8)
    assert (
        not hasattr(ahead, "bits")
        and ahead.make_mask(1, return_array=False, window_size=None) is None
    )
