"""Promises of IVC-Prune's anchors: which positions they are, along one axis and along three, and
that they join what a selector keeps, ahead of the language model and inside it."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.compatibility import check_pipeline
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.loading import load
from mlx_vlm_prune.models.language.rotary import RotaryTables, mean_rotation
from mlx_vlm_prune.pruners import Signals, plan, resolve
from mlx_vlm_prune.pruners.ivc import selected

from . import host_models, tiny

PAIRS = pytest.mark.parametrize("interleaved", [False, True])


def rotate_by(base: float, interleaved: bool):
    """A rotation whose pairs are neighbours, or half a head apart."""

    def rotate(x_BHLd: mx.array, positions_BL: mx.array) -> mx.array:
        d = x_BHLd.shape[-1]
        order = [*range(0, d, 2), *range(1, d, 2)] if interleaved else [*range(d)]
        turned = RotaryTables(positions_BL, d, base)(x_BHLd[..., mx.array(order)])
        return turned[..., mx.array(np.argsort(order))]

    return rotate


@PAIRS
def test_the_means_are_those_of_all_frequencies(interleaved):
    """Two frequencies, 1 and 0.1, by hand: (cos 2 + cos 0.2) / 2 and so on."""
    positions_BL = mx.array([[0, 2, 3]])
    cosine_BL, sine_BL = mean_rotation(rotate_by(100.0, interleaved), positions_BL, 4)
    np.testing.assert_allclose(np.array(cosine_BL), [[1, 0.281960, -0.017328]], atol=2e-6)
    np.testing.assert_allclose(np.array(sine_BL), [[0, 0.553983, 0.218320]], atol=2e-6)


@PAIRS
def test_along_three_axes_the_means_are_of_all_axes(interleaved):
    """Two by two tokens behind two words: time 2, rows and columns 2 and 3, the same sums."""
    half = rotate_by(100.0, interleaved)

    def rotate(x_BHLd: mx.array, positions_BL3: mx.array) -> mx.array:
        assert mx.array_equal(positions_BL3.min(axis=2), positions_BL3.max(axis=2))
        return half(x_BHLd, positions_BL3[..., 1])

    places = mx.array([[[2, 2, 2], [2, 2, 3], [2, 3, 2], [2, 3, 3]]])
    cosine_BL, sine_BL = mean_rotation(rotate, places, 4)
    by_hand = [[0.281960, 0.182197, 0.182197, 0.082435]]
    np.testing.assert_allclose(np.array(cosine_BL), by_hand, atol=2e-6)
    by_hand = [[0.553983, 0.442095, 0.442095, 0.330208]]
    np.testing.assert_allclose(np.array(sine_BL), by_hand, atol=2e-6)


def test_features_that_are_not_rotated_do_not_count():
    half = rotate_by(100.0, False)

    def rotate(x_BHLd: mx.array, positions_BL: mx.array) -> mx.array:
        return mx.concatenate([half(x_BHLd[..., :4], positions_BL), x_BHLd[..., 4:]], axis=-1)

    cosine_BL, sine_BL = mean_rotation(rotate, mx.array([[2]]), 6)
    assert cosine_BL.item() == pytest.approx(0.281960, abs=2e-6)
    assert sine_BL.item() == pytest.approx(0.553983, abs=2e-6)


def test_anchors_come_by_cosine_and_by_sine_in_turn():
    """One frequency: cosines of 0 to 6 rank 0 6 1 5 2 4 3, sines 2 1 3 0 6 4 5."""
    angle = np.arange(7.0)[None]
    signals = Signals(
        mx.zeros((1, 7, 2)), (1, 7),
        rotary_cosine_BN=mx.array(np.cos(angle)), rotary_sine_BN=mx.array(np.sin(angle)),
    )  # fmt: skip
    for anchors, K, kept in ((1, 2, [0, 2]), (0.75, 4, [0, 1, 2, 6]), (0, 3, [0, 1, 2])):
        pruner = plan(f"norm+ivc:anchors={anchors}").steps[0]  # of equal norms the first
        assert pruner(signals, K).index_BK.tolist() == [kept], anchors
    assert [selected(K) for K in (1, 2, 3, 5, 10, 98)] == [1, 1, 2, 3, 6, 59]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("ivc", "needs one, as in"), ("norm+ivc+ivc", "two methods of a kind"),
        ("norm+ivc+restore:published", "two methods of a kind"), ("tome+ivc", "after the tower"),
    ],
)  # fmt: skip
def test_chains_that_cannot_be_are_refused(spec, reason):
    with pytest.raises(UserError, match=reason):
        plan(spec)


def test_what_cannot_be_completed_is_refused():
    signals = Signals(mx.random.normal((1, 9, 4)), (3, 3))
    with pytest.raises(UserError, match="anchors is 2; it is a share of K from 0 to 1"):
        plan("norm+ivc:anchors=2").steps[0](signals, 4)
    with pytest.raises(UserError, match="a selector that merges no tokens"):
        plan("avgpool+ivc").steps[0](signals, 4)
    with pytest.raises(UserError, match=r"from 0 to 0\.5"):
        resolve("ivc_prune:anchors=0.7")(signals, 4)
    pipeline = plan("divprune+restore+ivc")
    assert pipeline.spec == "divprune+ivc+restore" and pipeline.positions == "keep"


def places_of(rates: list[float], positions: list[tuple[int, ...]]) -> list[int]:
    """Of each token the better place by its cosines or its sines, in plain numbers."""
    orders = []
    for turn in (math.cos, math.sin):
        mean = [
            round(sum(turn(p * rate) for p in place for rate in rates) / len(rates) / len(place), 6)
            for place in positions
        ]
        orders.append(sorted(range(len(mean)), key=lambda i: (-mean[i], i)))
    return [min(order.index(i) for order in orders) for i in range(len(positions))]


def joined(places: list[int], chosen: list[int], K: int) -> list[int]:
    others = sorted((i for i in range(len(places)) if i not in chosen), key=lambda i: places[i])
    return sorted(chosen + others[: K - len(chosen)])


def test_our_decoder_turns_positions_as_its_layers_do(tmp_path):
    ours = load(tiny.checkpoint(tiny.reference(), tmp_path), dtype="float32")[0].language
    d = tiny.TEXT.head_dim
    rates = [tiny.TEXT.rope_theta ** (-i / d) for i in range(0, d, 2)]
    cosine_BL, sine_BL = ours.mean_rotation(1, mx.array([[0, 5, 40]]))
    for mean_BL, turn in ((cosine_BL, math.cos), (sine_BL, math.sin)):
        by_hand = [sum(turn(p * rate) for rate in rates) / len(rates) for p in (0, 5, 40)]
        np.testing.assert_allclose(np.array(mean_BL)[0], by_hand, atol=1e-5)


def test_anchors_of_our_models_are_those_of_the_whole_prompt(tmp_path):
    """Of two images of a prompt the second's positions come later."""
    model = load(tiny.checkpoint(tiny.reference(), tmp_path), dtype="float32")[0]
    row, pixels = tiny.row("# and # is there a red star ?"), mx.random.normal((2, 64, 64, 3))
    trace = model([row], pixels, plan("norm+ivc"), 10).trace
    plain = model([row], pixels, plan("norm"), selected(10)).trace
    d = tiny.TEXT.head_dim
    rates = [tiny.TEXT.rope_theta ** (-i / d) for i in range(0, d, 2)]
    for image, (start, n) in enumerate(row.runs):
        chosen = plain.steps[-1].reductions[image].index_BK[0].tolist()
        places = places_of(rates, [(start + i,) for i in range(n)])
        kept = trace.steps[-1].reductions[image].index_BK[0].tolist()
        assert kept == joined(places, chosen, 10)


@pytest.fixture(scope="module")
def models():
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    return host_models.cached_models()


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize(
    "name", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3", "internvl_chat"]
)
def test_anchors_of_mlx_vlms_models_stand_at_positions_counted_by_hand(models, name):
    from .host_reference import indices, reduced
    from .test_hosts_deep import Sequence

    model = models(name)
    inputs = host_models.KINDS[name].inputs(model, 1)
    sequence = Sequence(model, name, inputs)
    axes = 3 if "qwen" in name else 1
    places = [tuple(place[:axes]) for place in sequence.place_L3[sequence.visual].tolist()]
    attention = getattr(model.language_model, "model", model.language_model).layers[0].self_attn
    base = getattr(getattr(attention, "rope", None), "base", 1e4)
    rates = [base ** (-i / 8) for i in range(8)]
    kept = indices(reduced(model, inputs, "norm+ivc", 0.5))
    n, K = len(places) // len(kept), len(kept[0])
    by_norm = indices(reduced(model, inputs, "norm", selected(K) / n + 1e-9))
    for view, (mine, chosen) in enumerate(zip(kept, by_norm, strict=True)):
        assert len(chosen) == selected(K) < K
        ranks = places_of(rates, places[view * n : view * n + n])
        assert mine == joined(ranks, chosen, K)


@pytest.mark.filterwarnings("ignore")
def test_a_model_whose_rotation_is_not_driven_from_here_is_refused(models):
    with pytest.raises(UserError, match="ivc cannot prune a fastvlm model: it reads how"):
        check_pipeline(host_of(models("fastvlm")), plan("norm+ivc"), None)
