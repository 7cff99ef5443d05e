"""Promises of `pact` in mlx-vlm's models: a merged token gets the attention of its members.

It does in every layer behind the cut, and for every token of the answer.
The reference is that of methods between layers, by numpy and without a cache.

Shapes: L rows of the prompt and the answer, N visual tokens of a view, D features, V words.
"""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from mlx_vlm_prune.hosts.prompt import PrunedPrompt

from .host_models import KINDS, cached_models
from .host_reference import table
from .test_hosts_deep import WHOLE, Sequence, answered, body_of, entering, pruned, through

SPEC = "pact:clustered=0.9,layer=1"


@pytest.fixture(scope="module")
def models():
    return cached_models()


class Merging:
    """The layers of a model, behind whose cut tokens are merged as in a prompt's trace."""

    def __init__(self, model: Any, name: str, prompt: PrunedPrompt, seq: Sequence):
        self.model, self.name, self.seq = model, name, seq
        step, begin = prompt.trace.steps[-1], 0
        self.cut, self.kept, self.parts = step.layer, [], []
        for one, n in zip(step.reductions, prompt.trace.sizes, strict=True):
            self.parts.append((slice(begin, begin + n), one))
            self.kept.append(one.index_BK[0].tolist())
            begin += n

    def merged(self, x_UD: np.ndarray) -> np.ndarray:
        """Visual rows, those that stay in place of their members."""
        mixed_UD = x_UD.copy()
        for tokens, one in self.parts:
            x_1ND = mx.array(x_UD[tokens], mx.float32)[None]
            mixed_UD[tokens][np.array(one.index_BK[0])] = np.array(one.apply(x_1ND)[0])
        return mixed_UD

    def log_sizes(self) -> np.ndarray:
        """Of how many members each visual row is, (U,)."""
        bias_U = np.zeros(self.parts[-1][0].stop)
        for tokens, one in self.parts:
            sizes_K = np.array(one.sizes(mx.ones((1, tokens.stop - tokens.start)))[0])
            bias_U[tokens][np.array(one.index_BK[0])] = np.log(sizes_K)
        return bias_U

    def logits(self, x_LD: np.ndarray, place_L3: np.ndarray) -> np.ndarray:
        """Of the last row, (V,)."""
        visual, body = np.flatnonzero(self.seq.visual), body_of(self.model)
        more = len(x_LD) - len(self.seq.x_LD)
        stay, bias_L = np.ones(len(x_LD), bool), np.zeros(len(x_LD))
        for number in range(3):
            if number == self.cut:
                x_LD = x_LD.copy()
                x_LD[visual] = self.merged(x_LD[visual])
                bias_L[visual] = self.log_sizes()
                stay = np.concatenate([self.seq.left(self.kept), np.ones(more, bool)])
            rows = x_LD[stay], place_L3[stay], bias_L[stay]
            x_LD = x_LD.copy()
            x_LD[stay] = through(self.name, body.layers[number], *rows)
            if number < len(self.seq.deep):
                deep_UD = self.seq.deep[number]
                x_LD[visual] += deep_UD if number < self.cut else self.merged(deep_UD)
        last = body.norm(mx.array(x_LD[-1:], mx.float32))
        head = getattr(self.model.language_model, "lm_head", None) or table(self.model).as_linear
        return np.array(head(last)[0], np.float64)


def assert_recomputed(layers: Merging, name: str, tokens: list[int], odds: np.ndarray) -> None:
    """An answer's odds are those of all its rows read again by `layers`, token by token."""
    x_LD, place_L3 = layers.seq.x_LD, layers.seq.place_L3
    for token, odds_V in zip(tokens, odds, strict=True):
        logits_V = layers.logits(x_LD, place_L3)
        expected_V = logits_V - np.log(np.exp(logits_V).sum())
        np.testing.assert_allclose(odds_V, expected_V, rtol=0, atol=1e-4)
        x_LD = np.concatenate([x_LD, entering(name, table(layers.model)(mx.array([token])))])
        place_L3 = np.concatenate([place_L3, np.full((1, 3), place_L3[-1].max() + 1)])


@pytest.mark.parametrize("piece", [3, None], ids=["in pieces", "whole"])
@pytest.mark.parametrize("name", [name for name in WHOLE if name != "gemma3"])
def test_a_merged_token_gets_the_attention_of_its_members(models, name, piece):
    model = models(name)
    inputs = KINDS[name].inputs(model)
    prompt = pruned(model, inputs, SPEC, 0.6, "keep", piece)
    tokens, odds = answered(model, prompt)
    seq = Sequence(model, name, inputs)
    layers = Merging(model, name, prompt, seq)
    assert layers.log_sizes().max() > 0.5
    assert_recomputed(layers, name, tokens, odds)


def test_without_the_members_attention_it_would_not_pass(models, monkeypatch):
    """The control: merged rows once each in the cache."""
    from mlx_vlm_prune.hosts import prefill

    model = models("llava")
    inputs = KINDS["llava"].inputs(model)
    _, odds = answered(model, pruned(model, inputs, SPEC, 0.6, "keep"))
    monkeypatch.setattr(prefill, "with_repeated_rows", lambda layer_cache: layer_cache)
    _, other = answered(model, pruned(model, inputs, SPEC, 0.6, "keep"))
    assert np.abs(odds - other).max() > 1e-3
