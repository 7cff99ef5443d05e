"""Promises of the presets: each says what the chain says that it is short for, and keeps the
tokens that the reference keeps with that chain."""

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.pruners import PRESETS, plan
from torch_ref.generation.parity import Kept, kept_by_layer
from torch_ref.models.vlm import VLM, VLMConfig

from . import tiny
from .test_model import steps_of

CHAINS = {
    "duet": "visionzip+pyramiddrop:start=0.5,stages=2",
    "vscan": "global_local+fastv:layer=0.5",
    "illava": "illava_tower+illava_decoder",
    "mustdrop": "window_merge+dual_attention",
    "hilo": "two_scales+lookahead",
}
K = 9
ROW = tiny.row("what is # in the picture ?")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same random weights in the reference and in MLX; six layers, so that half may leave."""
    torch.manual_seed(0)
    text = replace(tiny.TEXT, num_hidden_layers=6)
    reference = VLM(VLMConfig(tiny.VISION, text, image_token_id=tiny.IMAGE)).eval()
    for parameter in reference.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model, processor = load(tiny.checkpoint(reference, tmp_path_factory.mktemp("presets")))
    pixels = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    return SimpleNamespace(ours=model, theirs=reference, processor=processor, pixels=pixels)


def test_there_are_no_other_presets():
    assert PRESETS == CHAINS


@pytest.mark.parametrize("name", CHAINS)
def test_a_preset_answers_as_its_chain_does(pair, name):
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 255, (70, 70, 3), dtype=np.uint8))

    def answer(spec: str):
        given = generate(
            pair.ours, pair.processor, "Is there a red star?", image=image, pruner=spec,
            keep_tokens=K, max_tokens=8,
        )  # fmt: skip
        return given.token_ids, given.kept_indices, given.positions

    assert answer(name) == answer(CHAINS[name])
    assert answer(name)[:2] != answer(CHAINS[name].split("+")[0])[:2]  # both methods count


def kept_by_the_reference(pair, steps) -> Kept:
    """Which tokens of the image are left, by the layer that leaves them."""
    pixels = torch.from_numpy(pair.pixels.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        spliced, cuts = pair.theirs.embed([ROW], pixels, steps, None, "keep")
        return kept_by_layer(spliced, pair.theirs.prefill(spliced, cuts))


@pytest.mark.parametrize("name", CHAINS)
def test_the_reference_keeps_the_same_tokens(pair, name):
    before = pair.ours([ROW], mx.array(pair.pixels), plan(name), K, "keep")
    ours = [np.array(step.reductions[0].index_BK)[0].tolist() for step in before.trace.steps]
    theirs = kept_by_the_reference(pair, steps_of(pair, CHAINS[name], K))
    assert ours[-len(theirs) :] == [index for _, (index,) in theirs]
    assert len(theirs) > 1 and len(ours[-1]) < len(theirs[0][1][0])
