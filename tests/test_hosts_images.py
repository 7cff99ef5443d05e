"""Promises about images in several pictures, and about what a host refuses."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.compatibility import check_pipeline
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.host import Host
from mlx_vlm_prune.hosts.prepared_inputs import PreparedInputs, ProcessorOptions
from mlx_vlm_prune.hosts.prompt import share_budget
from mlx_vlm_prune.pruners import plan

from . import host_models
from .host_models import IMAGE, KINDS, cached_models
from .host_reference import MROPE, encoded, kept, let_norm_choose, prompt, reduced


@pytest.fixture(scope="module")
def models():
    return cached_models()


def test_crops_of_any_resolution_stand_in_one_block_in_place_of_the_first_placeholder(
    models, monkeypatch
):
    """Three crops of sixteen tokens; words 3 9 4, the block, words 5 8 2 30."""
    model, inputs = models("llava_next"), prompt(models, "llava_next")
    chosen = iter([[2, 9], [0, 7], [5, 15]])
    let_norm_choose(monkeypatch, lambda signals, K: kept(next(chosen)))
    pruned = reduced(model, inputs, "norm", 0.125)
    assert pruned.arguments["input_ids"].tolist() == [[3, 9, 4, IMAGE, 5, 8, 2, 30]]
    full, _ = KINDS["llava_next"].full(model, inputs)
    block = np.concatenate(
        [np.array(full[v])[i] for v, i in ((0, [2, 9]), (1, [0, 7]), (2, [5, 15]))]
    )
    np.testing.assert_allclose(
        np.array(pruned.arguments["cached_image_features"][0]), block, atol=1e-5
    )
    assert pruned.length == 7 + 6
    assert [view.image for view in pruned.views] == [0, 0, 0]


def test_without_pruning_the_newlines_behind_the_crops_stay_as_mlx_vlm_puts_them(models):
    model, inputs = models("llava_next"), prompt(models, "llava_next")
    block = reduced(model, inputs, "none", 1.0).arguments["cached_image_features"][0]
    assert block.shape[0] == 2 * 48
    assert (block[48:] == model.image_newline).all().item()


def test_tiles_belong_to_the_image_whose_whole_picture_ends_them(models, monkeypatch):
    """Two tiles and a whole, then an image that was not cut."""
    tile, whole = [50, *[IMAGE] * 4], [51, *[IMAGE] * 4]
    ids = [3, *tile, *tile, *whole, 7, *whole, 5]
    prepared = PreparedInputs(ids, mx.ones((1, len(ids))), mx.zeros((1, 4, 3, 56, 56)), 2)
    monkeypatch.setattr(Host, "prepare", lambda *_: prepared)

    class Processor:
        class tokenizer:
            convert_tokens_to_ids = {"<global-img>": 51}.get

    inputs = host_of(models("idefics3"), Processor()).prepare("", [], ProcessorOptions())
    assert inputs.extra["num_patches_list"] == [3, 1]


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "internvl_chat"])
def test_tiles_of_an_image_share_its_budget(models, name):
    model, inputs = models(name), prompt(models, name)
    views = encoded(model, inputs, "norm")
    assert [view.image for view in views] == [0, 0, 1]
    assert [view.signals.grid for view in views] == [(2, 2)] * 3


def test_a_tile_that_only_fills_up_a_batch_is_not_seen(models):
    model, inputs = models("idefics3"), prompt(models, "idefics3", 1)
    blank = mx.concatenate([inputs.pixels, mx.zeros_like(inputs.pixels[:, :1])], axis=1)
    assert len(encoded(model, replace(inputs, pixels=blank), "none")) == 2


def test_pictures_of_which_nobody_knows_whose_they_are_are_refused(models):
    model, inputs = models("gemma3"), prompt(models, "gemma3")
    three = mx.concatenate([inputs.pixels, inputs.pixels[:1]])
    with pytest.raises(UserError, match="2 images became 3 pictures"):
        encoded(model, replace(inputs, pixels=three), "none")


@pytest.mark.parametrize("name", KINDS)
def test_what_cannot_work_is_refused_by_name_with_the_reason(models, name):
    with pytest.raises(UserError, match="resize_shape makes the picture smaller"):
        check_pipeline(host_of(models(name)), plan("downsample"), None)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in MROPE])
def test_positions_that_a_model_only_counts_cannot_be_kept(models, name):
    with pytest.raises(UserError, match="counts the rows"):
        check_pipeline(host_of(models(name)), plan("norm"), "keep")


def test_a_tower_without_attention_refuses_what_needs_it():
    model = host_models.fastvlm()
    tower = model.vision_tower.vision_model
    tower.network[-1] = type(tower.network[-1])(
        [host_models.import_module("mlx_vlm.models.fastvlm.vision").RepMixerBlock(64)]
    )
    with pytest.raises(UserError, match="neither a CLS token nor attention"):
        check_pipeline(host_of(model), plan("vispruner"), None)
    check_pipeline(host_of(model), plan("divprune"), None)


def test_an_images_budget_is_shared_among_its_crops_in_proportion():
    assert share_budget(10, [16, 16, 16]) == [3, 3, 4]
    assert share_budget(7, [24, 12]) == [4, 3]
    assert share_budget(48, [16, 16, 16]) == [16, 16, 16]
    with pytest.raises(UserError, match="3 crops cannot keep 2"):
        share_budget(2, [16, 16, 16])


def test_more_placeholders_than_visual_tokens_are_refused(models):
    model, inputs = models("llava"), prompt(models, "llava", 1)
    longer = replace(inputs, ids=[IMAGE, *inputs.ids])
    with pytest.raises(UserError, match="room for 17 visual tokens and the images have 16"):
        reduced(model, longer, "norm", 0.5)
