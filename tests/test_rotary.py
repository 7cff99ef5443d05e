"""Promises of rotation and of what layers share: a GPU's kernel computes what the tables do.

The CPU runs the kernel's fallback, so the ways of both devices are compared here.

Shapes: B prompts, L rows, H heads, d head size.
"""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune.hosts.loading import load
from mlx_vlm_prune.models.cache import PADDING
from mlx_vlm_prune.models.language import minimind, rotary
from mlx_vlm_prune.models.language.minimind import ForwardPass, LayerStack
from mlx_vlm_prune.models.language.rotary import RotaryOffsets, RotaryTables, rope_kernel

from . import tiny
from .pruner_cases import close
from .test_model import POLICIES, ROWS, K, logits, steps

GAPS = [[3, 4, 9, 10, 40, 41, 42], [PADDING, PADDING, 0, 5, 6, 30, 31]]
CONTIGUOUS = [[600, 601, 602, 603, 604, 605, 606], [0, 1, 2, 3, 4, 5, 6]]
PLACES = [(GAPS, False), (CONTIGUOUS, True), (CONTIGUOUS, False), ([[1234], [7]], True)]
CUTS = ["none", "norm", "fastv", "pyramiddrop", "pact", "tome:r=2", "cls_attention+twig"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tiny.checkpoint(tiny.taught(tiny.reference()), tmp_path_factory.mktemp("model"))
    pixels = np.random.default_rng(0).normal(size=(3, 64, 64, 3)).astype(np.float32)
    return SimpleNamespace(ours=load(folder, dtype="float32")[0], pixels=pixels)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(rotary, "on_cpu", lambda: False)
    monkeypatch.setattr(minimind, "on_cpu", lambda: False)


def budget(spec: str) -> int:
    return tiny.N if spec == "none" else K


@pytest.mark.parametrize(
    ("dtype", "share"), [(mx.float32, 3e-5), (mx.float16, 3e-3), (mx.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize(("places", "contiguous"), PLACES)
def test_the_kernel_rotates_as_the_tables_do(places, contiguous, theta, dtype, share):
    positions_BL, head_dim = mx.array(places), 64
    B, L = positions_BL.shape
    x_BLHd = mx.array(np.random.default_rng(0).normal(size=(B, L, 3, head_dim))).astype(dtype)
    x_BHLd = x_BLHd.swapaxes(1, 2)
    expected = RotaryTables(positions_BL, head_dim, theta)(x_BHLd).astype(mx.float32)
    offsets = RotaryOffsets(positions_BL, contiguous)
    rotated = offsets.rotate(rope_kernel(head_dim, theta), x_BHLd)
    assert rotated.dtype == dtype and offsets.offset.size == (B if contiguous else B * L)
    real_B1L1 = (positions_BL != PADDING)[:, None, :, None]
    difference = mx.abs(mx.where(real_B1L1, rotated.astype(mx.float32) - expected, 0)).max()
    assert difference.item() <= share * mx.abs(expected).max().item()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spec", CUTS)
def test_a_padded_batch_is_read_and_continued_alike_on_both_devices(pair, spec, policy, request):
    usual, expected = logits(pair, list(ROWS), [0, 1, 2], spec, budget(spec), policy)
    after = [np.array(x) for x in steps(pair.ours, usual, [9, 12], len(ROWS))]
    request.getfixturevalue("as_on_a_gpu")
    other, got = logits(pair, list(ROWS), [0, 1, 2], spec, budget(spec), policy)
    for b, length in enumerate(usual.cache[-1].held.positions_BS.tolist()):
        real = sum(place != PADDING for place in length[: got.shape[1]])
        close(got[b, -real:], expected[b, -real:])
    for one, two in zip(steps(pair.ours, other, [9, 12], len(ROWS)), after, strict=True):
        close(np.array(one), two)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spec", CUTS)
def test_rows_that_are_called_contiguous_are(pair, spec, policy, monkeypatch):
    calls, run = [], LayerStack.run

    def recorded(self, numbers, x_BLD, positions_BL, cache, **options):
        calls.append((np.array(positions_BL), options.get("contiguous", False)))
        return run(self, numbers, x_BLD, positions_BL, cache, **options)

    monkeypatch.setattr(LayerStack, "run", recorded)
    for rows, images in ((list(ROWS), [0, 1, 2]), ([ROWS[1]], [0, 1])):
        before, _ = logits(pair, rows, images, spec, budget(spec), policy)
        list(steps(pair.ours, before, [9], len(rows)))
    assert all(not flag or (np.diff(positions_BL) == 1).all() for positions_BL, flag in calls)
    alone = [flag for positions_BL, flag in calls if len(positions_BL) == 1]
    assert all(alone) == (spec == "none" or policy == "renumber")


def test_layers_between_the_same_cuts_share_positions_and_masks(pair, monkeypatch):
    """Which the prompt, new tokens, forks and rewinds leave so."""
    masks, mask = [], ForwardPass._mask
    monkeypatch.setattr(ForwardPass, "_mask", lambda *a: masks.append(a[1]) or mask(*a))
    before, _ = logits(pair, [tiny.row("user # what ?")], [0], "vtw", 9, "keep")
    cuts = [layer.rows for layer in before.cache]
    list(steps(pair.ours, before, [9, 12], 1))
    fork = before.fork()
    for layer in fork.cache:
        layer.rewind(layer.rows - 1)
    list(steps(pair.ours, fork, [9], 1))
    for prefill in (before, fork):
        assert len({id(layer.held) for layer in prefill.cache}) == len(set(cuts)) < len(cuts)
    segments = len(set(cuts))
    assert len(masks) == (1 + 3) * segments


@pytest.mark.parametrize("spec", ["norm", "norm+restore"])
def test_a_decoded_token_appends_keys_and_values_only(pair, spec):
    """The positions held are joined when somebody reads them, and stay right."""
    before, _ = logits(pair, [ROWS[0]], [0], spec, K)
    held = before.cache[0].held
    list(steps(pair.ours, before, [9, 12, 13], 1))
    after = before.cache[0].held
    assert after.rows == held.rows + 3 and len(after.parts) == len(held.parts) + 3
    places = np.array(after.positions_BS)[0]
    assert len(places) == after.rows and (np.diff(places) >= 1).all()
    assert places[-3:].tolist() == [len(ROWS[0].ids) + i for i in range(3)]
