"""`restore` as its authors' code has it in a whole model: what it adds while a prompt is read, and
not later. Choices and biases are compared in test_authors.py.
"""

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_vlm_prune.pruners import plan

from . import tiny
from .pruner_cases import close
from .test_model import POLICIES, ROWS, K, pair, steps_of
from .test_model import test_logits_equal_the_reference_for_every_method as check_logits

SPECS = ["divprune+restore:published", "norm:keep=12+cls_attention+restore:published,strength=0.5"]
__all__ = ["pair"]  # a fixture


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spec", [*SPECS, "norm+restore:published,decay=false,theta=100,dims=24"])
def test_logits_equal_the_reference(pair, spec, policy):
    check_logits(pair, spec, policy)


@pytest.mark.parametrize("size", [1, 5, 7])
def test_a_prompt_in_pieces_is_read_as_in_one(pair, size):
    pixels, pipeline = mx.array(pair.pixels[:2]), plan(SPECS[0], {})
    read = pair.ours.splice_images([ROWS[1]], pixels, pipeline, K)
    whole, _ = pair.ours.decode(read)
    pieces, _ = pair.ours.decode(read, prefill_step_size=size)
    close(np.array(pieces.spliced.x_BLD), np.array(whole.spliced.x_BLD))


@pytest.mark.parametrize(
    "part", ["anchors", "selected", "prompt_bias", "calibration", "rotary_decay", "calibrates"]
)
def test_the_check_fails_for_a_broken_twin(pair, part, monkeypatch):
    wrong = {
        "anchors": lambda similar, count: list(range(count)),
        "selected": lambda K, published: K - 1,
        "prompt_bias": lambda signals, kept: torch.zeros(kept.index_BK.shape),
        "calibration": lambda N, K, positions: (0.0, torch.zeros(positions)),
        "rotary_decay": lambda distance, theta, dims: torch.tensor(0.5),
        "calibrates": lambda published: False,
    }
    monkeypatch.setattr(f"torch_ref.pruners.restore.{part}", wrong[part])
    with pytest.raises(AssertionError):
        check_logits(pair, SPECS[0], "keep")


@pytest.mark.parametrize("spec", SPECS)
def test_tokens_of_the_answer_add_nothing(pair, spec):
    pixels = torch.from_numpy(pair.pixels[:2].transpose(0, 3, 1, 2).copy())
    before = pair.ours([ROWS[1]], mx.array(pair.pixels[:2]), plan(spec, {}), K, "keep")
    with torch.no_grad():
        embedded = pair.theirs.embed([ROWS[1]], pixels, steps_of(pair, spec, K))
        theirs = pair.theirs.prefill(*embedded)
        for token in tiny.row("yes the red star is left of it").ids:
            assert all(layer.bias_BS is None for layer in before.cache)
            assert not any(bias_L.any() for bias_L in theirs.each[0].biases)
            ours = np.array(before.step(mx.array([[token]])))[:, 0]
            pair.theirs.step(theirs, torch.tensor([token]))
            close(ours, theirs.logits_BV.numpy())


def test_a_prompt_without_an_image_is_read_as_without_an_enhancer(pair):
    words = tiny.row("is there a red star ?")
    pixels, chain = mx.array(pair.pixels[:1]), plan(SPECS[0], {})
    both = pair.ours([ROWS[0], words], pixels, chain, K, last_only=False).logits_BLV[1]
    alone = pair.ours([words], None, plan("none", {}), tiny.N, last_only=False).logits_BLV[0]
    close(np.array(both)[-len(words.ids) :], np.array(alone))
