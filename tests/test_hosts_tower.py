"""Promises of methods inside the towers of mlx-vlm's models: the tokens that leave, and the rest.

Towers once more, token by token, are in `host_towers`.
"""

from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune import pruned
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.compatibility import check_pipeline
from mlx_vlm_prune.hosts.families import FAMILIES, host_of
from mlx_vlm_prune.hosts.prompt import ImageBudget, encode_images
from mlx_vlm_prune.hosts.tower_cache import TowerCache
from mlx_vlm_prune.pruners import METHODS, Stage, plan

from . import host_towers
from .host_models import KINDS, cached_models
from .host_reference import decoded, indices, prompt, reduced, reference, stock
from .test_pruned_tools import batch

CUT = [name for name in KINDS if FAMILIES[name].why_no_encoder_methods is None]
ONE_OF_EACH = ["llava", "gemma3", "idefics3", "qwen2_5_vl", "qwen3_vl"]
INSIDE = [
    "patch_norm",
    "kq_norm",
    "tome",
    "ipcv:until=2",
    "illava_tower",
    "flowcut",
    "window_merge",
]


@pytest.fixture(scope="module")
def models():
    return cached_models()


def views_of(model, inputs, spec: str, ratio: float):
    pipeline = plan(spec)
    budget = ImageBudget(keep_ratio=ratio).by_view(pipeline)
    return encode_images(host_of(model), inputs, pipeline, budget)


def test_these_families_let_tokens_leave():
    needed = {"llava", "llava_next", "gemma3", "idefics3", "smolvlm", "paligemma", "internvl_chat",
              "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"}  # fmt: skip
    assert needed <= {*CUT}


@pytest.mark.parametrize("name", CUT)
def test_with_all_tokens_kept_it_is_the_stock_model_bit_for_bit(models, name):
    model, inputs = models(name), prompt(models, name, 1)
    tokens, odds = decoded(model, reduced(model, inputs, "tome", 1.0).arguments)
    theirs, their_odds = stock(model, inputs)
    assert tokens == theirs
    np.testing.assert_array_equal(odds, their_odds)


@pytest.mark.parametrize("spec", INSIDE)
@pytest.mark.parametrize("name", CUT)
def test_the_tower_is_that_of_a_loop_over_its_tokens(models, name, spec):
    model, inputs = models(name), prompt(models, name)
    views = views_of(model, inputs, spec, 0.5)
    pictures = host_towers.pictures(name, model, inputs)
    assert len(views) == len(pictures)
    for view, picture in zip(views, pictures, strict=True):
        K = view.N // 2
        places, x_KD, deep = host_towers.encode(picture, spec.partition(":")[0], K)
        assert view.kept.index_BK[0].tolist() == places
        np.testing.assert_allclose(np.array(view.signals.x_BND[0]), x_KD, rtol=1e-4, atol=1e-4)
        assert len(deep) == len(view.deepstack)
        for ours, theirs in zip(view.deepstack, deep, strict=True):
            np.testing.assert_allclose(np.array(ours[0]), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CUT)
def test_tokens_that_come_back_are_those_of_a_loop(models, name):
    """A method after the tower finds all; DeepStack adds to those that were away, too."""
    model, inputs = models(name), prompt(models, name)
    views = views_of(model, inputs, "ipcv:until=2+norm", 0.5)
    for view, picture in zip(views, host_towers.pictures(name, model, inputs), strict=True):
        assert view.kept is None
        left = max(1, int(0.35 * view.N))
        places, x_ND, deep = host_towers.encode(picture, "ipcv+norm", left)
        assert places == list(range(view.N))
        np.testing.assert_allclose(np.array(view.signals.x_BND[0]), x_ND, rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(view.deepstack, deep, strict=True):
            np.testing.assert_allclose(np.array(ours[0]), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "paligemma", "llava"])
def test_what_a_decoder_method_ranks_by_is_of_all_tokens_that_come_back(models, name):
    model, inputs = models(name), prompt(models, name, 1)
    (view,) = views_of(model, inputs, "ipcv+dual_attention:behind=false", 0.5)
    attention_1N = np.array(view.signals.cls_attention_BN)
    assert view.kept is None and attention_1N.shape == (1, view.N)
    assert np.isfinite(attention_1N).all() and (attention_1N > 0).all()


@pytest.mark.parametrize("wrong", ["windows", "angles"])
def test_windows_or_rotations_that_stay_behind_would_not_pass(models, wrong):
    model, inputs = models("qwen2_5_vl"), prompt(models, "qwen2_5_vl", 1)
    (picture,) = host_towers.pictures("qwen2_5_vl", model, inputs)
    if wrong == "windows":
        picture.windowed = lambda layer: False
    else:
        angles = [token.angles for token in picture.tokens]
        for token, others in zip(picture.tokens, angles[::-1], strict=True):
            token.angles = others
    (view,) = views_of(model, inputs, "patch_norm", 0.5)
    _, x_KD, _ = host_towers.encode(picture, "patch_norm", view.N // 2)
    assert np.abs(np.array(view.signals.x_BND[0]) - x_KD).max() > 1e-3


@pytest.mark.parametrize("spec", ["patch_norm", "tome", "kq_norm+divprune"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_an_answer_is_that_of_the_short_sequence_without_a_cache(models, name, spec, monkeypatch):
    """The embeddings that are left, each at its own place among the words."""
    model, inputs, kind = models(name), prompt(models, name), KINDS[name]
    one = reduced(model, inputs, spec, 0.5)
    kept, full, deep = indices(one), [], []
    for view, reduction, index in zip(one.views, one.trace.steps[-1].reductions, kept, strict=True):
        assert reduction.slots == len(index) == view.N // 2
        at = [view.kept.index_BK[0].tolist().index(place) for place in index]
        x_KD = np.array(host_of(model).project(view.signals.x_BND)[0])[at]
        full.append(spread(x_KD / (8 if name == "gemma3" else 1), index, view.N))
        deep.append([spread(np.array(y[0])[at], index, view.N) for y in view.deepstack])
    whole = (full, deep if deep[0] else [])
    monkeypatch.setitem(
        KINDS, name, KINDS[name].__class__(**{**vars(kind), "full": lambda *a: whole})
    )
    tokens, odds = decoded(model, one.arguments)
    policy = "keep" if FAMILIES[name].has_mrope else "renumber"
    expected, theirs = reference(models, name, inputs, kept, policy)
    assert tokens == expected
    np.testing.assert_allclose(odds, theirs, rtol=0, atol=1e-4)


def test_in_a_batch_every_prompt_answers_as_if_alone(models):
    for name in ("llava", "idefics3", "qwen2_5_vl"):
        model, kind = models(name), KINDS[name]
        prompts = [kind.inputs(model, 1), kind.inputs(model, 2)]
        with pruned(model, "kq_norm", keep_ratio=0.5):
            answers = batch(model, prompts)
        for answer, inputs in zip(answers, prompts, strict=True):
            tokens, odds = decoded(model, reduced(model, inputs, "kq_norm", 0.5).arguments)
            assert [token for token, _ in answer] == tokens
            expected = [odds[i, token] for i, token in enumerate(tokens)]
            np.testing.assert_allclose([p for _, p in answer], expected, rtol=0, atol=1e-4)


def spread(x_KD: np.ndarray, index: list[int], N: int) -> mx.array:
    """Embeddings at the places of their tokens; NaN at others, which nobody may read."""
    x_ND = np.full((N, x_KD.shape[1]), np.nan, np.float32)
    x_ND[index] = x_KD
    return mx.array(x_ND)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_restore_counts_what_left_inside_the_tower(models, name):
    model, inputs = models(name), prompt(models, name, 1)
    views = views_of(model, inputs, "kq_norm:keep=3+norm+restore", 0.25)
    for view in views:
        represented = view.signals.represented_BN[0]
        assert represented.shape == (min(3, view.N),)
        assert float(represented.sum()) == view.N
    one = reduced(model, inputs, "kq_norm:keep=3+norm+restore", 0.25)
    host = host_of(model)
    bias_l, ids = np.array(one.bias_l), np.array(inputs.ids)[np.array(one.kept_rows.rows_l)]
    is_visual = ids == host.image_token_id(inputs)
    assert (bias_l[~is_visual] == 0).all() and (bias_l[is_visual] > 0).any()


@pytest.mark.parametrize("spec, kept", [("pixelprune", 0), ("docprune", 1)])
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
def test_what_tells_nothing_leaves_first(models, name, spec, kept):
    """A picture of one colour but for its last visual token; for `docprune` a pixel of its second
    has ink."""
    model, inputs = models(name), prompt(models, name, 1)
    pixels, ink = np.zeros(inputs.pixels.shape, np.float32), float(spec == "docprune")
    N = views_of(model, inputs, "tome", 1.0)[0].N
    if name == "qwen2_5_vl":
        pixels[-4:] = 1
        pixels.reshape(len(pixels), 3, 2, -1)[5, :, 0, 7] = ink
    else:
        side = 56 // int(N**0.5)
        pixels[..., -side:, -side:] = 1
        pixels[..., 0, side] = ink
    view, *_ = views_of(model, replace(inputs, pixels=mx.array(pixels)), spec, 2 / N)
    assert view.kept.index_BK[0].tolist() == [kept, N - 1]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_block_prunes_the_same_and_leaves_nothing_behind(models, name):
    model, inputs = models(name), prompt(models, name)
    one = reduced(model, inputs, "kq_norm", 0.5)
    before, tower = {**vars(model)}, model.vision_tower
    theirs = stock(model, inputs)
    with pruned(model, "kq_norm", keep_ratio=0.5) as report:
        tokens, odds = stock(model, inputs)
    assert report.prompts[-1].kept_indices == indices(one)
    expected, their_odds = decoded(model, one.arguments)
    assert tokens == expected
    np.testing.assert_allclose(odds, their_odds, rtol=0, atol=1e-4)
    assert {**vars(model)} == before and model.vision_tower is tower
    np.testing.assert_array_equal(stock(model, inputs)[1], theirs[1])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_images_are_held_by_what_left_of_them(models, name):
    """Another budget or method is another run of the tower; the same is none."""
    host, inputs = host_of(models(name)), prompt(models, name)
    towers = TowerCache(host)
    sizes = []
    for spec, ratio in [("tome", 0.5), ("tome", 0.25), ("kq_norm", 0.5), ("tome", 0.5)]:
        views = towers.of(plan(spec), ImageBudget(keep_ratio=ratio))(inputs)
        sizes.append(sum(view.signals.x_BND.shape[1] for view in views))
    assert towers.misses == 3 and sizes[0] == sizes[2] == sizes[3] == 2 * sizes[1]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_images_of_a_prompt_keep_as_many_each_as_alone(models, name):
    model, both = models(name), prompt(models, name)
    pipeline = plan("kq_norm")
    budget = ImageBudget(keep_tokens=9).by_view(pipeline)
    views = encode_images(host_of(model), both, pipeline, budget)
    left = [view.signals.x_BND.shape[1] for view in views]
    assert left == [min(9, view.N) for view in views]
    alone = encode_images(host_of(model), prompt(models, name, 1), pipeline, budget)
    assert len(alone) == 1 and alone[0].signals.x_BND.shape[1] == left[0]


@pytest.mark.parametrize("spec", [n for n, m in METHODS.items() if m.stage is Stage.ENCODER])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_method_of_the_tower_leaves_as_many_as_it_is_told(models, name, spec):
    """Alone, and ahead of another one."""
    model, inputs = models(name), prompt(models, name)
    for chain in (spec, f"{spec}+divprune"):
        one = reduced(model, inputs, chain, 0.5)
        kept = one.trace.steps[-1].reductions
        assert [each.slots for each in kept] == [view.N // 2 for view in one.views]
        _, odds = decoded(model, one.arguments)
        assert np.isfinite(odds).all()


@pytest.mark.parametrize("name", [name for name in KINDS if name not in CUT])
def test_other_families_say_why_not(models, name):
    host = host_of(models(name))
    with pytest.raises(UserError, match="between the tower's layers"):
        check_pipeline(host, plan("kq_norm"), None)


def test_a_group_is_a_token(models):
    """Four patches stay or leave together: as many rows as four times the tokens."""
    model, inputs = models("qwen2_5_vl"), prompt(models, "qwen2_5_vl", 1)
    rows = Counter()
    block = type(model.vision_tower.blocks[0].mlp)
    real = block.__call__

    def counted(self, x):
        rows[x.shape[-2]] += 1
        return real(self, x)

    block.__call__ = counted
    try:
        (view,) = views_of(model, inputs, "patch_norm", 0.25)
    finally:
        block.__call__ = real
    assert rows == {4 * (view.N // 4): len(model.vision_tower.blocks)}
