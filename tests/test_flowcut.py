"""Promises of `flowcut`: scores of all layers, tokens that leave by entropy, in the whole tower.

Shapes: B images, N tokens, K kept.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

import torch_ref.pruners as ref
from mlx_vlm_prune.models.towers import signals as tower_signals
from mlx_vlm_prune.models.towers.signals import Cut, Encoded, TowerPass
from mlx_vlm_prune.pruners import METHODS, flowcut, resolve
from torch_ref.pruners import flowcut as twin

from .flow_tower import CONFIG, N, mlx_tower, pixels, reference_tower
from .pruner_cases import close

pytestmark = pytest.mark.usefixtures("on_the_cpu_in_float64")
AUTHORS = json.loads((Path(__file__).parent / "authors" / "flowcut.json").read_text())["tower"]


def run(tower, images: np.ndarray, K: int, spec: str = "flowcut") -> Encoded:
    """The tower with its tokens cut to K."""
    pruner = resolve(spec)
    plan = pruner.call(pruner.method.cuts, CONFIG.depth, N, K)
    return tower(mx.array(images), {}, [Cut(*place, pruner) for place in plan])


def run_reference(tower, images: np.ndarray, K: int, **options) -> object:
    step = ref.Step("flowcut", K, options)
    plan = step.call("cuts", CONFIG.depth, N, K)
    pixels_B3HW = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        return tower(
            pixels_B3HW, ref.signal_layers(step, CONFIG.depth), [(*at, step) for at in plan]
        )


@pytest.fixture
def left(monkeypatch) -> list[int]:
    """How many tokens stayed at each cut."""
    counts, decide = list[int](), TowerPass._left

    def noting(self, cut, signals):
        counts.append(decide(self, cut, signals))
        return counts[-1]

    monkeypatch.setattr(tower_signals.TowerPass, "_left", noting)
    return counts


@pytest.mark.parametrize(
    ("n", "remaining", "entropy", "stays"),
    [
        (100, 3, 0.5, 100),  # none at every second layer
        (100, 0, 0.5, 20),  # the last leaves K
        (100, 4, 0.5, 70),  # 80 / 2 * 3 / 4 leave
        (100, 2, 0.0, 43),  # 80 / 1.4142 = 56.57
        (100, 2, 1.0, 100),
        (21, 2, 0.0, 20),  # 0.707
        (21, 4, 0.0, 21),  # 0.5, to the even one
        (20, 4, 0.1, 20),
    ],
)
def test_how_many_leave_by_hand(n, remaining, entropy, stays):
    assert flowcut.left_of(n, 20, remaining, entropy) == stays
    assert twin.stay(n, 20, remaining, entropy) == stays


def test_entropy_is_a_share_of_the_largest():
    assert flowcut.entropy_of(np.full(8, 0.1)) == pytest.approx(1)
    assert flowcut.entropy_of(np.array([0.3, 0, 0.3, 0])) == pytest.approx(0.5)
    assert flowcut.entropy_of(np.array([1.0, 0, 0])) == 0


def test_half_of_a_score_is_what_was_there_before():
    """One head, values of one number: of layer 1 the lengths 1, 2, 3 count, of layer 2 3, 2, 1."""
    scores = []
    for before, values in ((None, [1.0, 2.0, 3.0]), ([0.4, 1.0, 2.0], [3.0, 2.0, 1.0])):
        given = tower_signals.Signals(
            mx.zeros((1, 3, 1)),
            (1, 3),
            cls_row_BN=mx.array([[0.1, 0.1, 0.2]]),
            values_BNHd=mx.array(values).reshape(1, 3, 1, 1),
            cls_value_BHd=mx.zeros((1, 1, 1)),  # alike to all: a third each
            accumulated_BN=None if before is None else mx.array([before]),
        )
        scores.append(np.array(flowcut.accumulate(given))[0])
    share = np.array([0.25, 0.25, 0.5]) + 1 / 3
    np.testing.assert_allclose(scores[0], share * [1, 2, 3])
    np.testing.assert_allclose(scores[1], (share * [3, 2, 1] + [0.4, 1, 2]) / 2, rtol=1e-6)


@pytest.mark.parametrize("case", AUTHORS, ids=lambda case: f"seed {case['seed']}")
def test_the_tower_keeps_what_the_authors_code_keeps(case, left):
    reference, K = reference_tower(case["seed"]), case["K"]
    left.clear()
    ours = run(mlx_tower(reference), pixels(case["seed"]), K)
    theirs = run_reference(reference, pixels(case["seed"]), K)
    for b, image in enumerate(case["images"]):
        per_layer = left[b * (CONFIG.depth - 1) : (b + 1) * (CONFIG.depth - 1)]
        assert [*per_layer, K] == image["left"]
        assert ours.kept.index_BK[b].tolist() == image["index"]
        assert theirs.kept.index_BK[b].tolist() == image["index"]
        for x_KD in (np.array(ours.signals.x_BND[b]), theirs.signals.x_BND[b].numpy()):
            sums = (x_KD * np.arange(1, x_KD.shape[1] + 1)).mean(axis=1)
            np.testing.assert_allclose(sums, image["sums"], rtol=1e-3, atol=1e-3)


def test_an_image_decides_alone_how_many_of_its_tokens_leave(left):
    """In a batch of two whose entropies differ."""
    tower, images = mlx_tower(reference_tower(0)), pixels(0)
    together = run(tower, images, 7)
    counts, layers = left[:], CONFIG.depth - 1
    assert counts[:layers] != counts[layers:] and counts[layers - 1] == counts[-1] == 7
    for b in range(2):
        alone = run(tower, images[b : b + 1], 7)
        assert alone.kept.index_BK[0].tolist() == together.kept.index_BK[b].tolist()
        close(np.array(alone.signals.x_BND[0]), np.array(together.signals.x_BND[b]))


def test_an_entropy_that_is_given_needs_no_return_to_the_host(left, monkeypatch):
    reference = reference_tower(1)
    monkeypatch.setattr(flowcut, "on_host", None)
    ours = run(mlx_tower(reference), pixels(1), 10, "flowcut:entropy=0.8")
    theirs = run_reference(reference, pixels(1), 10, entropy=0.8)
    assert left == [n for _, _, n in flowcut.cuts(CONFIG.depth, N, 10, entropy=0.8)]
    assert ours.kept.index_BK.tolist() == theirs.kept.index_BK.tolist()
    close(np.array(ours.signals.x_BND), theirs.signals.x_BND.numpy())
    with pytest.raises(ValueError, match="entropy is 2; it is a share of the largest, 0 to 1"):
        flowcut.cuts(CONFIG.depth, N, 10, entropy=2)


SLIPS = {
    "scores that do not add up": ("accumulate", lambda signals: flowcut.layer_scores(signals)),
    "another root": ("left", lambda signals, K, remaining: max(K, 64 - 8 * (8 - remaining))),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_put_in_on_purpose_is_seen(slip, left, monkeypatch):
    name, broken = SLIPS[slip]
    monkeypatch.setitem(METHODS, "flowcut", replace(METHODS["flowcut"], **{name: broken}))
    with pytest.raises(AssertionError):
        for case in AUTHORS:
            test_the_tower_keeps_what_the_authors_code_keeps(case, left)


def test_the_largest_root_is_that_of_the_layers_left():
    """From 64 to 10 in nine layers: the first cut lets go by sqrt(6), at an entropy of 0."""
    first = next(n for layer, _, n in flowcut.cuts(9, 64, 10, entropy=1e-9) if layer == 1)
    assert first == 64 - round(54 / math.sqrt(6))
