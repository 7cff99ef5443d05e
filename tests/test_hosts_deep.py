"""Promises about methods between the language model's layers, in mlx-vlm's models.

The reference is written here: rotation, attention and layers by hand, no cache, every step over
all rows, each at a place counted in the test, with what leaves left out from its layer on.

Shapes: L rows, D features, H heads, d head size, n visual tokens of an image, V words.
"""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.compatibility import check_pipeline
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.prefill import prefill_through_cuts
from mlx_vlm_prune.hosts.prompt import (
    PrunedPrompt,
    budgets_by_view,
    encode_images_and_text,
    prune_prompt,
)
from mlx_vlm_prune.pruners import Signals, plan

from . import host_folders
from .host_models import IMAGE, KINDS, cached_models
from .host_reference import QWEN, TOKENS, decoded, rotary_means, rows, stock, table
from .test_hosts_generate import left_on
from .test_pruned import by_view

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
DEEP = ["llava", *QWEN, "gemma3", "idefics3", "internvl_chat"]
WHOLE = [name for name in DEEP if set(KINDS[name].tiles) == {1}]  # images are one view each
INSIDE = "fastv pyramiddrop dart v2drop vtw sparsevlm:recycle=0 dual_attention ivc_prune".split()
SECTIONS = {"qwen2_vl": [2, 3, 3], "qwen2_5_vl": [2, 3, 3], "qwen3_vl": [4, 2, 2]}


@pytest.fixture(scope="module")
def models():
    return cached_models()


def pruned(model, inputs, spec: str, ratio: float, positions=None, piece=None) -> PrunedPrompt:
    pipeline, host = plan(spec), host_of(model)
    policy = check_pipeline(host, pipeline, positions)
    views = encode_images_and_text(host, inputs, pipeline)
    K = budgets_by_view(views, ratio, None, pipeline)
    prompt = prune_prompt(host, inputs, views, pipeline, K, policy)
    done = prefill_through_cuts(host, prompt, pipeline, K, policy, piece)
    assert done.cache
    return done


def answered(model, prompt: PrunedPrompt) -> tuple[list[int], np.ndarray]:
    return decoded(model, prompt.arguments | {"pixel_values": None}, prompt_cache=prompt.cache)


def axes(name: str) -> list[int]:
    """Which of three positions turns each pair of features."""
    if name not in QWEN:
        return [0] * 8
    sections = SECTIONS[name]
    if name != "qwen3_vl":
        return [axis for axis, n in enumerate(sections) for _ in range(n)]
    return [next((a for a in (1, 2) if i % 3 == a and i < 3 * sections[a]), 0) for i in range(8)]


def turned(name: str, x_HLd: np.ndarray, place_L3: np.ndarray, base: float) -> np.ndarray:
    angle_La = place_L3[:, axes(name)] * base ** (-np.arange(8) / 8)
    cos, sin, a, b = np.cos(angle_La), np.sin(angle_La), x_HLd[..., :8], x_HLd[..., 8:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def heads(name: str, layer: Any, x_LD: np.ndarray, place_L3: np.ndarray):
    """Queries and keys, turned, and values, (H, L, 16) each."""
    attention, y = layer.self_attn, layer.input_layernorm(mx.array(x_LD, mx.float32))
    q, k, v = (
        np.array(p(y), np.float64).reshape(len(x_LD), -1, 16).swapaxes(0, 1)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        q, k = (np.array(norm(mx.array(z, mx.float32)), np.float64)
                for norm, z in ((attention.q_norm, q), (attention.k_norm, k)))  # fmt: skip
    base = getattr(getattr(attention, "rope", None), "base", 1e4)
    return turned(name, q, place_L3, base), turned(name, k, place_L3, base), v


def weights(q_HLd: np.ndarray, k_GLd: np.ndarray, bias_L: Any = 0) -> np.ndarray:
    """Causal attention (H, L, L); rows may get more."""
    logits = q_HLd @ np.repeat(k_GLd, len(q_HLd) // len(k_GLd), 0).swapaxes(1, 2) / 4 + bias_L
    logits[:, ~np.tri(*logits.shape[1:], dtype=bool)] = -np.inf
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def through(
    name: str, layer: Any, x_LD: np.ndarray, place_L3: np.ndarray, bias_L: Any = 0
) -> np.ndarray:
    q, k, v = heads(name, layer, x_LD, place_L3)
    out = weights(q, k, bias_L) @ np.repeat(v, len(q) // len(v), 0)
    out_LD = mx.array(out.swapaxes(0, 1).reshape(len(x_LD), -1), mx.float32)
    attended = layer.self_attn.o_proj(out_LD)
    if name == "gemma3":
        h = mx.array(x_LD, mx.float32) + layer.post_attention_layernorm(attended)
        mixed = layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h)))
        return np.array(h + mixed, np.float64)
    h = mx.array(x_LD, mx.float32) + attended
    return np.array(h + layer.mlp(layer.post_attention_layernorm(h)), np.float64)


def body_of(model: Any) -> Any:
    """What has the layers and the last norm."""
    return getattr(model.language_model, "model", model.language_model)


def entering(name: str, x_LD: mx.array) -> np.ndarray:
    """Rows as the first layer takes them in."""
    return np.array(x_LD, np.float64) * (8 if name == "gemma3" else 1)


class Sequence:
    """A whole prompt, and where everything stands."""

    def __init__(self, model: Any, name: str, inputs: Any):
        self.name = name
        embeds, deep = KINDS[name].full(model, inputs)
        all_of = [list(range(len(image))) for image in embeds]
        x_LD, places, visual = rows(model, name, inputs, all_of, embeds)
        self.x_LD, self.visual = entering(name, x_LD), np.array(visual)
        if name not in QWEN:
            places = [(i, i, i) for i in range(len(places))]
        self.place_L3 = np.array(places, np.float64)
        self.whose = [(v, i) for v, image in enumerate(embeds) for i in range(len(image))]
        self.deep = [np.concatenate([np.array(y[layer], np.float64) for y in deep])
                     for layer in range(len(deep[0]) if deep else 0)]  # fmt: skip

    def left(self, kept: list[list[int]]) -> np.ndarray:
        """Which rows of the prompt stay."""
        is_kept, kept = self.visual == 0, by_view(self.name, kept)
        is_kept[self.visual] = [i in kept[v] for v, i in self.whose]
        return is_kept


def reference(model, name: str, inputs, layers: list[dict], policy: str):
    """Tokens and log probabilities (T, V)."""
    seq, tokens, odds = Sequence(model, name, inputs), [], []
    body, head = body_of(model), getattr(model.language_model, "lm_head", None)
    x_LD, place_L3 = seq.x_LD, seq.place_L3
    for _ in range(TOKENS):
        h, more, is_kept = x_LD, len(x_LD) - len(seq.x_LD), np.ones(len(x_LD), bool)
        for run in layers:
            stay = np.concatenate([seq.left(run["kept_indices"]), np.ones(more, bool)])
            h, is_kept = h[stay[is_kept]], stay
            place = place_L3[is_kept]
            if policy == "renumber" and run["first"]:
                place = np.repeat(np.arange(len(place))[:, None], 3, 1).astype(float)
            for number in range(run["first"], run["last"] + 1):
                h = through(name, body.layers[number], h, place)
                if number < len(seq.deep):
                    y = np.zeros_like(x_LD)
                    y[: len(seq.x_LD)][seq.visual] = seq.deep[number]
                    h = h + y[is_kept]
        last = body.norm(mx.array(h[-1:], mx.float32))
        logits_V = np.array((head or table(model).as_linear)(last)[0], np.float64)
        odds.append(logits_V - np.log(np.exp(logits_V).sum()))
        tokens.append(int(odds[-1].argmax()))
        x_LD = np.concatenate([x_LD, entering(name, table(model)(mx.array(tokens[-1:])))])
        place_L3 = np.concatenate([place_L3, np.full((1, 3), place_L3[-1].max() + 1)])
    return tokens, np.stack(odds)


@pytest.mark.parametrize("name", DEEP)
def test_the_reference_is_the_stock_model_where_nothing_leaves(models, name):
    model = models(name)
    inputs = KINDS[name].inputs(model)
    grids = iter(KINDS[name].grids)
    sizes = [sum(h * w for h, w in (next(grids) for _ in range(n))) for n in KINDS[name].tiles]
    whole = [{"first": 0, "last": 2, "kept_indices": [list(range(n)) for n in sizes]}]
    tokens, odds = reference(model, name, inputs, whole, "keep")
    expected, expected_odds = stock(model, inputs)
    assert tokens == expected
    np.testing.assert_allclose(odds, expected_odds, rtol=0, atol=1e-4)


@pytest.mark.parametrize("piece", [3, None], ids=["in pieces", "whole"])
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("spec", INSIDE)
@pytest.mark.parametrize("name", DEEP)
def test_an_answer_is_that_of_fewer_rows_in_deeper_layers(models, name, spec, positions, piece):
    model = models(name)
    for images in (1, 2):
        inputs = KINDS[name].inputs(model, images)
        prompt = pruned(model, inputs, spec, 0.6, positions, piece)
        assert len(prompt.trace.layers(3)) > 1
        tokens, odds = answered(model, prompt)
        expected, expected_odds = reference(model, name, inputs, prompt.trace.layers(3), positions)
        assert tokens == expected
        np.testing.assert_allclose(odds, expected_odds, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", DEEP)
def test_places_counted_anew_would_not_pass_for_kept_ones(models, name):
    """The control."""
    model = models(name)
    inputs = KINDS[name].inputs(model)
    prompt = pruned(model, inputs, "fastv", 0.6, "renumber")
    _, odds = answered(model, prompt)
    kept = reference(model, name, inputs, prompt.trace.layers(3), "keep")[1]
    assert np.abs(odds - kept).max() > 1e-2


@pytest.mark.parametrize("name", DEEP)
def test_rows_counted_by_the_cache_would_not_pass_either(models, name):
    """The control for what comes after the prompt: caches without what they are ahead by, Qwen's
    positions without theirs."""
    model = models(name)
    inputs = KINDS[name].inputs(model)
    prompt = pruned(model, inputs, "fastv", 0.6, "keep")
    if name not in QWEN:
        prompt.cache[:] = [getattr(one, "cache", one) for one in prompt.cache]
    else:
        prompt.arguments["rope_deltas"] = prompt.arguments["rope_deltas"] - 7
    _, odds = answered(model, prompt)
    expected = reference(model, name, inputs, prompt.trace.layers(3), "keep")[1]
    assert np.abs(odds - expected).max() > 1e-2


@pytest.mark.parametrize("spec", ["visionzip+fastv", "divprune+vtw", "vispruner+pyramiddrop"])
@pytest.mark.parametrize("name", DEEP)
def test_what_leaves_behind_the_tower_stays_away_in_all_layers(models, name, spec):
    model = models(name)
    inputs = KINDS[name].inputs(model, 1)
    prompt = pruned(model, inputs, spec.replace("visionzip", "cls_attention"), 0.5, "keep")
    first, *_, last = prompt.trace.layers(3)
    assert set(last["kept_indices"][0]) < set(first["kept_indices"][0])
    assert len(first["kept_indices"][0]) < sum(prompt.trace.sizes)
    tokens, odds = answered(model, prompt)
    expected, expected_odds = reference(model, name, inputs, prompt.trace.layers(3), "keep")
    assert tokens == expected
    np.testing.assert_allclose(odds, expected_odds, rtol=0, atol=1e-4)


def by_hand(model, name: str, inputs, cut: int):
    """What a method may ask of the first image at a layer."""
    seq, body = Sequence(model, name, inputs), body_of(model)
    h = before = seq.x_LD
    for number in range(cut):
        before, h = h, through(name, body.layers[number], h, seq.place_L3)
        if number < len(seq.deep):
            h[seq.visual] += seq.deep[number]
    visual = np.flatnonzero(seq.visual)
    q, k, v = heads(name, body.layers[cut - 1], before, seq.place_L3)
    values = mx.array(v.swapaxes(0, 1), mx.float32)
    next_q, next_k, _ = heads(name, body.layers[cut], h, seq.place_L3)
    keys, normed = k.swapaxes(0, 1).reshape(len(h), -1), body.norm(mx.array(h, mx.float32))
    words = mx.arange(int(visual[-1]) + 1, len(h))  # after the image
    return Signals(
        mx.array(h[visual], mx.float32)[None], KINDS[name].grids[0],
        before_BND=mx.array(before[visual], mx.float32)[None],
        last_attention_BN=mx.array(weights(q, k).mean(0)[-1, visual], mx.float32)[None],
        next_attention_BN=mx.array(weights(next_q, next_k).mean(0)[-1, visual], mx.float32)[None],
        keys_BND=mx.array(keys[visual], mx.float32)[None],
        text_keys_BTD=mx.array(keys, mx.float32)[words][None],
        normed_BND=normed[mx.array(visual)][None], text_BTD=normed[words][None],
        text_real_BT=mx.ones((1, words.size), mx.bool_),
        held_values_BNHd=values[mx.array(visual)][None], text_values_BTHd=values[words][None],
        **rotary_means(name, body.layers[cut], seq.place_L3[visual]),
    )  # fmt: skip


@pytest.mark.parametrize("spec", [*INSIDE[:4], "ivc_prune", "fastv+ivc"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_method_sees_what_the_layer_really_computes(models, name, spec):
    model = models(name)
    inputs = KINDS[name].inputs(model, 1)
    prompt = pruned(model, inputs, spec, 0.6)
    (kept,) = prompt.trace.layers(3)[1]["kept_indices"]
    signals = by_hand(model, name, inputs, prompt.trace.layers(3)[1]["first"])
    assert plan(spec).steps[0](signals, len(kept)).index_BK[0].tolist() == kept


@pytest.mark.parametrize("name", [name for name in KINDS if name not in (*DEEP, "smolvlm")])
def test_where_layers_are_not_driven_from_here_a_method_is_refused(models, name):
    with pytest.raises(UserError, match="fastv cannot prune"):
        check_pipeline(host_of(models(name)), plan("fastv"), None)


@pytest.mark.parametrize(
    "spec, reason",
    [
        ("divprune+vtw+restore", "share no mask"),
        ("fastv+restore", "share no mask"),
    ],
)
@pytest.mark.parametrize("name", DEEP)
def test_methods_that_change_attention_are_refused_by_name(models, name, spec, reason):
    with pytest.raises(UserError, match=reason):
        check_pipeline(host_of(models(name)), plan(spec), None)


def test_a_prompt_that_ends_in_an_image_is_refused(models):
    from dataclasses import replace

    inputs = KINDS["llava"].inputs(models("llava"), 1)
    ids = inputs.ids[: 1 + max(i for i, token in enumerate(inputs.ids) if token == IMAGE)]
    inputs = replace(inputs, ids=ids, mask_1L=mx.ones((1, len(ids)), mx.int32))
    with pytest.raises(UserError, match="ends in an image"):
        pruned(models("llava"), inputs, "fastv", 0.6)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep")
    host_folders.picture(folder, "a.png", 80, 90)
    host_folders.picture(folder, "b.png", 120, 60)
    return folder


@pytest.fixture(scope="module")
def loaded(home):
    return {name: load(host_folders.checkpoint(name, home)) for name in ["llava", *QWEN[1:]]}


@pytest.mark.parametrize("spec", INSIDE)
@pytest.mark.parametrize("name", ["llava", *QWEN[1:]])
def test_the_main_job_prunes_between_layers_and_tells_each_layers_rows(loaded, home, name, spec):
    model, processor = loaded[name]
    before = left_on(model)
    images = [home / "a.png", home / "b.png"]
    answer = generate(
        model, processor, "w7 w9", images, pruner=spec, keep_ratio=0.6, max_tokens=5,
        host_options={"prefill_step_size": 6},
    )  # fmt: skip
    assert left_on(model) == before
    assert len(answer.token_ids) == 5 and answer.positions == plan(spec).positions
    assert answer.layers[0]["first"] == 0 and answer.layers[-1]["last"] == 2
    held = [
        run["visual_tokens"] for run in answer.layers for _ in range(run["first"], run["last"] + 1)
    ]
    assert answer.visual_tokens_kept == round(sum(held) / 3) <= 0.6 * answer.visual_tokens
    assert answer.kept_indices == answer.layers[-1]["kept_indices"]
    rows_held = 3 * (answer.prompt_tokens - answer.visual_tokens) + sum(held)
    assert answer.cache_bytes == rows_held * 2 * 2 * 16 * 4  # key and value, heads, float32
    assert answer.ttft_ms["pruner"] > 0 or spec == "vtw"
    assert answer.overlay().size[0] > 600
