"""Promises of `restore` in mlx-vlm's models: kept tokens get more attention, in every layer and for
every token of the answer.

The reference is that of the hosts, with a mask that holds the biases, and without a cache.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune import pruned
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.families import FAMILIES, host_of
from mlx_vlm_prune.hosts.prefill import prompt_cache
from mlx_vlm_prune.hosts.pruned_folder import prune_into
from mlx_vlm_prune.pruners import METHODS, plan

from . import host_models
from .host_models import IMAGE, KINDS, cached_models
from .host_reference import (
    HYBRID,
    MaskOnly,
    biased_mask,
    decoded,
    encoded,
    indices,
    kept,
    prompt,
    reduced,
    reference,
    rows,
    stock,
    table,
)
from .test_pruned import BATCHED, by_view, several
from .test_pruned_tools import batch, prompts_of

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
ABLE = [name for name in KINDS if FAMILIES[name].why_no_enhancer is None]
SPEC = "vispruner+restore:strength=1.5"


@pytest.fixture(scope="module")
def models():
    return cached_models()


def biases_of(model, inputs, index: list[list[int]]) -> list[list[float]]:
    """What `restore` says of these tokens of each picture, by the tower's features."""
    views, pruner = encoded(model, inputs, SPEC), plan(SPEC).enhancer
    return [
        pruner.call(METHODS["restore"].attention_bias, view.signals, kept(chosen))[0].tolist()
        for view, chosen in zip(views, index, strict=True)
    ]


@pytest.mark.parametrize("step", [3, None, 2048], ids=["chunked", "whole", "default"])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", ABLE)
def test_an_answer_is_that_of_the_biased_mask_without_a_cache(models, name, images, step):
    if images > len(KINDS[name].tiles):
        pytest.skip(f"{name} reads one image")
    model, inputs = models(name), prompt(models, name, images)
    short = reduced(model, inputs, SPEC, 0.3)
    biases = biases_of(model, inputs, indices(short))
    assert max(map(max, biases)) > 0.5
    cache = prompt_cache(host_of(model), short)
    tokens, odds = decoded(model, short.arguments, prefill_step_size=step, prompt_cache=cache)
    expected, expected_odds = reference(models, name, inputs, indices(short), biases=biases)
    assert tokens == expected
    np.testing.assert_allclose(odds, expected_odds, rtol=0, atol=1e-4)
    _, unbiased = reference(models, name, inputs, indices(short))
    assert np.abs(odds - unbiased).max() > 1e-3


@pytest.mark.parametrize("step", [3, None, 2048], ids=["chunked", "whole", "default"])
@pytest.mark.parametrize("name", ABLE)
def test_so_is_that_of_a_pruned_block(models, name, step):
    model = models(name)
    for images in range(1, several(name) + 1):
        inputs = KINDS[name].inputs(model, images)
        with pruned(model, SPEC, keep_ratio=0.3) as report:
            tokens, odds = stock(model, inputs, prefill_step_size=step)
        index = by_view(name, report.prompts[-1].kept_indices)
        biases = biases_of(model, inputs, index)
        expected, expected_odds = reference(models, name, inputs, index, biases=biases)
        assert tokens == expected
        np.testing.assert_allclose(odds, expected_odds, rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", [{}, {"at_once": 1}, {"prefill_step_size": 3}], ids=repr)
@pytest.mark.parametrize("name", [name for name in BATCHED if name in ABLE])
def test_so_is_that_of_every_prompt_of_a_batch_beside_one_of_words(models, name, how):
    """Read at once, in pieces, or joining those that answer already."""
    model = models(name)
    prompts = prompts_of(model, name)
    with pruned(model, SPEC, keep_ratio=0.3) as report:
        answers = batch(model, prompts, **how)
    one, both = (by_view(name, prompt.kept_indices) for prompt in report.prompts)
    for answer, inputs, index in zip(answers, prompts, [one, [], both], strict=True):
        biases = biases_of(model, inputs, index) if index else None
        tokens, odds = reference(models, name, inputs, index, biases=biases)
        assert [token for token, _ in answer] == tokens
        expected = [odds[i, token] for i, token in enumerate(tokens)]
        np.testing.assert_allclose([p for _, p in answer], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 3.5])
@pytest.mark.parametrize("step", [None, 3])
def test_a_quantised_cache_gets_the_same_mask(monkeypatch, bits, step):
    """The reference is mlx-vlm's loop with caches whose masks are written down here. Of fractional
    bits the cache that makes the masks has none, and stays as it is in both."""
    from mlx_vlm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

    model = host_models.llava(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    inputs = KINDS["llava"].inputs(model, 2)
    short = reduced(model, inputs, SPEC, 0.3)
    options = {"prefill_step_size": step, "kv_bits": bits, "quantized_kv_start": 0}
    cache = prompt_cache(host_of(model), short)
    tokens, odds = decoded(model, short.arguments, prompt_cache=cache, **options)
    assert bits == 3.5 or type(cache[0]).__name__ == "QuantizedKVCache"

    visual = (short.arguments["input_ids"] == IMAGE)[0].tolist() + [False] * 9
    whole = biased_mask(visual, biases_of(model, inputs, indices(short)))

    def make_mask(self, N, **_):
        return whole[..., self.offset : self.offset + N, : self.offset + N]

    for kind in (KVCache, QuantizedKVCache):
        monkeypatch.setattr(kind, "make_mask", make_mask)
    stock_cache = make_prompt_cache(model.language_model)
    stock_cache[0].preserve_auxiliary_kv_state = True
    expected, expected_odds = decoded(model, short.arguments, prompt_cache=stock_cache, **options)
    assert tokens == expected
    np.testing.assert_allclose(odds, expected_odds, rtol=0, atol=1e-4)


def test_so_does_that_of_a_quantised_batch():
    model = host_models.llava(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    prompts = prompts_of(model, "llava")
    with pruned(model, SPEC, keep_ratio=0.3):
        alone = [batch(model, [one], kv_bits=8)[0] for one in prompts]
        for how in ({}, {"at_once": 1}):
            for answer, expected in zip(
                batch(model, prompts, kv_bits=8, **how), alone, strict=True
            ):
                np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-4)


def test_a_window_of_attention_lets_biases_go_with_its_rows(monkeypatch):
    """Gemma 3's, shorter here than prompt and answer. The reference has a mask for each layer."""
    monkeypatch.setattr("tests.host_reference.TOKENS", 12)
    window = 8
    model = host_models.gemma3()
    language = model.language_model
    language.config.sliding_window = language.model.window_size = window
    inputs = KINDS["gemma3"].inputs(model, 1)
    short = reduced(model, inputs, SPEC, 0.5)
    (index,) = indices(short)
    cache = prompt_cache(host_of(model), short)
    assert cache[0].max_size == window < short.length + 12
    tokens, odds = decoded(model, short.arguments, prefill_step_size=3, prompt_cache=cache)
    biases = biases_of(model, inputs, [index])
    embeds, _ = KINDS["gemma3"].full(model, inputs)
    x_LD, _, visual = rows(model, "gemma3", inputs, [index], embeds)
    for token, odds_V in zip(tokens, odds, strict=True):
        mask = biased_mask(visual, biases)
        at = mx.arange(len(visual))
        windowed = mx.where(at[:, None] < at + window, mask, -mx.inf)
        pattern = language.model.sliding_window_pattern
        masks = [MaskOnly(mask if i % pattern == pattern - 1 else windowed)
                 for i in range(len(language.layers))]  # fmt: skip
        ids = mx.zeros((1, len(visual)), mx.int32)
        logits_V = language(ids, inputs_embeds=x_LD[None], cache=masks).logits[0, -1]
        expected_V = np.array(logits_V - mx.logsumexp(logits_V))
        np.testing.assert_allclose(odds_V, expected_V, rtol=0, atol=1e-4)
        x_LD, visual = mx.concatenate([x_LD, table(model)(mx.array([token]))]), [*visual, False]


def test_a_call_that_would_leave_the_biases_out_is_refused(models):
    model = models("llava")
    inputs = KINDS["llava"].inputs(model, 1)
    with pruned(model, SPEC, keep_ratio=0.3), pytest.raises(UserError, match="with a cache"):
        model(mx.array(inputs.ids)[None], inputs.pixels, inputs.mask_1L)


def test_a_model_whose_layers_take_no_mask_is_refused_by_name(models):
    with pytest.raises(UserError, match=r"restore cannot prune a paligemma model: .* no mask"):
        reduced(models("paligemma"), prompt(models, "paligemma", 1), SPEC, 0.3)
    assert {*KINDS} - {*ABLE} == {"paligemma", *HYBRID}


def test_what_needs_another_mask_in_each_layer_is_refused(models):
    spec, reason = "divprune+restore:published", r"restore cannot prune a llava model: .* a mask"
    with pytest.raises(UserError, match=reason):
        reduced(models("llava"), prompt(models, "llava", 1), spec, 0.3)


@pytest.mark.parametrize("name", ABLE)
def test_a_written_folder_answers_the_same(name, tmp_path):
    from .into_folders import answer, assert_same, checkpoint, fastvlm_sizes, inputs_of

    with fastvlm_sizes():
        checkpoint(name, tmp_path)
        prune_into(tmp_path / name, tmp_path / "new", SPEC, 0.5)
        whole, written = load_model(tmp_path / name), load_model(tmp_path / "new")
        inputs = inputs_of(name, whole, 1)
        short = reduced(whole, inputs, SPEC, 0.5)
        cache = prompt_cache(host_of(whole), short)
        expected = decoded(whole, short.arguments, prompt_cache=cache)
        assert_same(answer(name, written, inputs), expected)


def load_model(folder):
    from mlx_vlm.utils import load_model

    return load_model(folder)
