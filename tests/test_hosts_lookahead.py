"""Promises of `lookahead` and `dual_attention` in mlx-vlm's models.

The reference is that of methods between layers, by numpy and without a cache.

Shapes: L rows of the prompt and the answer, N visual tokens of a view, D features, V words.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.biased_cache import add_biases, with_repeated_rows
from mlx_vlm_prune.hosts.compatibility import check_pipeline, why_not_enhance
from mlx_vlm_prune.hosts.families import FAMILIES, host_of
from mlx_vlm_prune.pruners import METHODS, Method, Pipeline, Pruner, Stage, plan

from .host_models import KINDS, cached_models
from .host_reference import table
from .test_hosts_deep import WHOLE, Sequence, answered, body_of, pruned, through
from .test_hosts_merged import Merging, assert_recomputed

NAMES = [name for name in WHOLE if name != "gemma3"]


@pytest.fixture(scope="module")
def models():
    return cached_models()


class Looking(Merging):
    """The layers of a model, the first of which pay leaving rows twice as much attention."""

    def logits(self, x_LD: np.ndarray, place_L3: np.ndarray) -> np.ndarray:
        """Of the last row, (V,)."""
        visual, body = np.flatnonzero(self.seq.visual), body_of(self.model)
        more = np.ones(len(x_LD) - len(self.seq.x_LD), bool)
        stay_behind = np.concatenate([self.seq.left(self.kept), more])
        for number in range(3):
            is_ahead = number < self.cut
            stay = np.ones(len(x_LD), bool) if is_ahead else stay_behind
            bias_L = np.where(stay_behind, 0.0, np.log(2)) if is_ahead else np.zeros(len(x_LD))
            x_LD = x_LD.copy()
            rows = x_LD[stay], place_L3[stay], bias_L[stay]
            x_LD[stay] = through(self.name, body.layers[number], *rows)
            if number < len(self.seq.deep):
                x_LD[visual] += self.seq.deep[number]
        last = body.norm(mx.array(x_LD[-1:], mx.float32))
        head = getattr(self.model.language_model, "lm_head", None) or table(self.model).as_linear
        return np.array(head(last)[0], np.float64)


@pytest.mark.parametrize("piece", [3, None], ids=["in pieces", "whole"])
@pytest.mark.parametrize("name", NAMES)
def test_leaving_rows_get_twice_the_attention_until_they_leave(models, name, piece):
    model = models(name)
    inputs = KINDS[name].inputs(model)
    prompt = pruned(model, inputs, "lookahead:layer=1", 0.6, "keep", piece)
    tokens, odds = answered(model, prompt)
    seq = Sequence(model, name, inputs)
    layers = Looking(model, name, prompt, seq)
    assert_recomputed(layers, name, tokens, odds)


def test_without_a_boost_it_would_not_pass(models):
    """The control."""
    model = models("llava")
    inputs = KINDS["llava"].inputs(model)
    odds = [
        answered(model, pruned(model, inputs, f"lookahead:layer=1,boost={boost}", 0.6, "keep"))[1]
        for boost in (0, 1)
    ]
    assert np.abs(odds[0] - odds[1]).max() > 1e-3


def test_rows_that_are_held_several_times_are_counted_so(models):
    """Before layer 1 those that leave stand 1 + boost times."""
    model = models("llava")
    inputs, nbytes = KINDS["llava"].inputs(model), {}
    for boost in (0, 3):
        done = pruned(model, inputs, f"lookahead:layer=1,boost={boost}", 0.6, "keep")
        nbytes[boost] = done.cache_bytes
    leaving = sum(done.trace.sizes) - sum(one.slots for one in done.trace.steps[-1].reductions)
    assert leaving > 0
    assert nbytes[3] - nbytes[0] == 3 * leaving * 2 * 2 * 16 * 4  # key and value, heads, float32


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_factor_that_is_not_whole_is_refused(dtype):
    from mlx_vlm.models.cache import KVCache

    for factor in (1.5, 7.0, 200.0):
        cache = KVCache()
        add_biases([cache], [0], mx.full((1, 4), np.log(factor)).astype(dtype))
        cache.make_mask(4)
        cache.update_and_fetch(mx.zeros((1, 1, 4, 2)), mx.zeros((1, 1, 4, 2)))
        if factor == 1.5:
            with pytest.raises(UserError, match=r"raises attention 1\.5 times; .* a whole number"):
                with_repeated_rows(cache)
        elif dtype == mx.float32 or factor < 100:
            assert with_repeated_rows(cache).offset == 4 * factor


@pytest.mark.parametrize("name", NAMES)
def test_the_towers_key_tokens_stay(models, name):
    """A share of 0.4 of those that enter by CLS attention, or what stands in for it."""
    model, host = models(name), host_of(models(name))
    inputs = KINDS[name].inputs(model)
    prompt = pruned(model, inputs, "dual_attention:key=0.4,behind=false", 0.6, "keep")
    views = host.encode_images(inputs, {"cls_attention": host.depth - 1})
    for view, reduction in zip(views, prompt.trace.steps[-1].reductions, strict=True):
        attention_N = np.array(view.signals.cls_attention_BN[0])
        key = np.argsort(-attention_N, kind="stable")[: int(np.ceil(0.4 * len(attention_N)))]
        kept = set(np.array(reduction.index_BK[0]).tolist())
        assert len(kept) < len(attention_N)
        assert set(key.tolist()) <= kept or kept < set(key.tolist())


def test_a_method_that_does_not_read_rotation_needs_no_layers_for_it():
    """Of a family whose language model is not driven from here; one that does is refused."""
    family = next(f for f in FAMILIES.values() if not f.language_layers_class)
    completing = Method("mine", "", Stage.ENHANCER, complete=lambda signals, kept, K: kept)
    reading = replace(completing, needs={"rotation": None})
    assert why_not_enhance(family, Pruner("mine", completing)) is None
    assert "how the language model's layers rotate" in why_not_enhance(
        family, Pruner("mine", reading)
    )


def test_a_selector_that_reads_rotation_is_refused_where_it_cannot(models):
    host = host_of(models("llava_next"))
    assert not host.language_layers_class
    selecting = replace(METHODS["norm"], name="mine", needs={"rotation": None})
    with pytest.raises(
        UserError, match=r"mine cannot prune .* how the language model's layers rot"
    ):
        check_pipeline(host, Pipeline((Pruner("mine", selecting),)), None)


def test_what_it_cannot_have_is_one_sentence(models):
    host = host_of(models("llava"))
    with pytest.raises(UserError, match="two_scales cannot prune a llava model: it needs the pix"):
        check_pipeline(host, plan("hilo"), None)
