"""Methods that know a clip's frames apart choose over the whole clip, by one budget.

Shapes: B clips, T frames of n tokens, N = Tn, K kept, D features.
"""

import math

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torch_ref.pruners as ref
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.pruners import METHODS, Signals

from .pruner_cases import INPUTS, case, make_pruner, reference_signals, signals

pytestmark = pytest.mark.usefixtures("on_the_cpu_in_float64")
SPECS = ["evs", "evs:first=1", "evs:first=0", "vidcom2", "vidcom2:temperature=0.5"]
Vector = list[float]


@st.composite
def clips(draw):
    """(arrays, T, K)"""
    T, rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    N = T * rows * columns
    arrays = case(draw(st.sampled_from(INPUTS)), draw(st.integers(1, 2)), (T * rows, columns),
                  draw(st.integers(0, 99)))  # fmt: skip
    return arrays, T, draw(st.integers(1, N))


def kept_by(spec: str, arrays: dict, T: int, K: int) -> list[list[int]]:
    """Of each clip."""
    return make_pruner(spec)(signals(arrays).replace(frames=T), K).index_BK.tolist()


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=30, deadline=None)
@given(clip=clips())
def test_twins_and_loops_keep_the_same_and_clips_do_not_know_each_other(spec, clip):
    arrays, T, K = clip
    pruner = make_pruner(spec)
    ours = kept_by(spec, arrays, T, K)
    twin = ref.reduce(pruner.name, reference_signals(arrays).replace(frames=T), K, **pruner.options)
    assert ours == twin.index_BK.tolist()
    for b, x_ND in enumerate(arrays["x_BND"].astype(float).tolist()):
        assert ours[b] == BY_LOOPS[pruner.name](x_ND, T, K, **pruner.options)
        alone = {k: v if k == "grid" else v[b : b + 1] for k, v in arrays.items()}
        assert kept_by(spec, alone, T, K) == [ours[b]]


def evs_by_loops(x: list[Vector], T: int, K: int, first: float = 0.5) -> list[int]:
    n = len(x) // T
    quota = min(n, max(math.ceil(K / T), math.floor(first * K)))
    units = [unit(v) for v in x]
    middle = unit(mean(units[:n]))
    of_first = {i: 1 - dot(units[i], middle) for i in range(n)}
    later = {i: 1 - dot(units[i], units[i - n]) for i in range(n, len(x))}
    return sorted(best(of_first, quota) + best(later, K - quota))


def vidcom2_by_loops(x: list[Vector], T: int, K: int, temperature: float = 0.01) -> list[int]:
    n, D = len(x) // T, len(x[0])
    columns = [[v[d] for v in x] for d in range(D)]
    spread = {d: -round(variance(columns[d]), 12) for d in range(D)}
    quiet = sorted(best(spread, max(1, D // 2)))
    units = [unit([v[d] for d in quiet]) for v in x]
    frames = [range(t * n, t * n + n) for t in range(T)]
    clip = mean(units)
    to_clip = [gaussians(u, clip) for u in units]
    closeness = [sum(to_clip[i] for i in frame) / n for frame in frames]
    powers = [math.exp((min(closeness) - c) / temperature) for c in closeness]
    weights = [round(1 + p / sum(powers) - 1 / T, 12) for p in powers]
    turns = {}
    for frame, weight in zip(frames, weights, strict=True):
        of_frame = mean([units[i] for i in frame])
        score = {i: -round(to_clip[i] + gaussians(units[i], of_frame), 12) for i in frame}
        for rank, i in enumerate(best(score, n)):
            turns[i] = -(rank + 0.5) / weight if rank else weight
    return sorted(best(turns, K))


BY_LOOPS = {"evs": evs_by_loops, "vidcom2": vidcom2_by_loops}


def best(scores: dict[int, float], K: int) -> list[int]:
    """The K keys of the highest values, in that order; of equals the lower ones."""
    return sorted(scores, key=lambda i: (-scores[i], i))[:K]


def unit(v: Vector) -> Vector:
    length = max(math.sqrt(sum(a * a for a in v)), 1e-6)
    return [a / length for a in v]


def dot(u: Vector, v: Vector) -> float:
    return round(sum(a * b for a, b in zip(u, v, strict=True)), 12)


def mean(vectors: list[Vector]) -> Vector:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def variance(values: Vector) -> float:
    middle = sum(values) / len(values)
    return sum((v - middle) ** 2 for v in values) / len(values)


def gaussians(u: Vector, centre: Vector) -> float:
    square = sum((a - b) ** 2 for a, b in zip(u, centre, strict=True))
    return sum(math.exp(-square / 2 / scale) for scale in (0.125, 0.25, 0.5, 1.0, 2.0))


@pytest.mark.parametrize("spec", SPECS)
def test_keeping_a_whole_clip_is_the_identity_bit_for_bit(spec):
    arrays = case("random", 1, (8, 3), 1)
    kept = make_pruner(spec)(signals(arrays).replace(frames=4), 24)
    assert np.array(kept.tokens(mx.array(arrays["x_BND"]))).tobytes() == arrays["x_BND"].tobytes()


def test_in_a_clip_that_stands_still_evs_keeps_what_moved():
    """Four frames of 2 x 3 tokens; in the third two tokens change, in the fourth one of them goes
    back. The first frame gets half of six; its token 5 is least like the others."""
    e = np.eye(4, dtype=np.float32)
    frame = np.stack([e[0], e[0], e[0], e[0], e[0], e[1]])
    x = np.concatenate([frame] * 4)
    x[12], x[13] = e[2], e[3]
    x[18], x[19] = e[0], e[3]
    tokens = Signals(mx.array(x[None]), (8, 3), frames=4)
    kept = make_pruner("evs")(tokens, 6).index_BK[0].tolist()
    assert kept == [0, 1, 5, 12, 13, 18]
    assert make_pruner("evs:first=1")(tokens, 6).index_BK[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert make_pruner("evs:first=0")(tokens, 6).index_BK[0].tolist() == [0, 5, 6, 12, 13, 18]


def test_vidcom2_keeps_more_of_a_frame_that_is_unlike_the_others_and_one_of_each():
    """The third of four frames shows something else; its weight is 1.75, the others' 0.75. Turns of
    ranks 0, 1, 2, 3 are at -1.75, 0.86, 1.43, 2.0 there and -0.75, 2.0, 3.33, 4.67 elsewhere."""
    rng = np.random.default_rng(0)
    x = np.tile(rng.normal(size=(1, 4, 8)), (4, 1, 1)) + 1e-3 * rng.normal(size=(4, 4, 8))
    x[2] = rng.normal(size=(4, 8))
    tokens = Signals(mx.array(x.reshape(1, 16, 8).astype(np.float32)), (8, 2), frames=4)
    for K, by_frame in ((1, [0, 0, 1, 0]), (4, [1, 1, 1, 1]), (6, [1, 1, 3, 1])):
        kept = np.array(make_pruner("vidcom2")(tokens, K).index_BK[0]).astype(int)
        assert np.bincount(kept // 4, minlength=4).tolist() == by_frame


def test_the_same_tokens_as_ever_are_kept_of_a_clip():
    """A memory, looked at once: six frames of 2 x 3 tokens."""
    i, d = np.meshgrid(np.arange(36), np.arange(8), indexing="ij")
    x = np.sin(0.3 * i + 1.1 * d + 0.37 * i * d + 0.01 * i * i)[None].astype(np.float32)
    tokens = Signals(mx.array(x), (12, 3), frames=6)
    assert make_pruner("evs")(tokens, 9).index_BK[0].tolist() == GOLDEN["evs"]
    assert make_pruner("vidcom2")(tokens, 9).index_BK[0].tolist() == GOLDEN["vidcom2"]


GOLDEN = {
    "evs": [0, 1, 2, 4, 9, 10, 17, 26, 34],
    "vidcom2": [1, 9, 12, 15, 18, 19, 20, 29, 30],
}


@pytest.mark.parametrize("spec, sentence", [
    ("evs:first=1.5", "evs: first is 1.5; it must be from 0 to 1"),
    ("vidcom2:temperature=0", "vidcom2: temperature is 0; it must be above 0"),
])  # fmt: skip
def test_options_out_of_range_are_refused(spec, sentence):
    with pytest.raises(UserError, match=sentence):
        kept_by(spec, case("random", 1, (4, 2), 0), 2, 3)


def test_a_broken_twin_is_seen(monkeypatch):
    """One that takes the frames for one: what it keeps is not what the others keep."""
    arrays = case("random", 1, (8, 3), 5)
    for name in BY_LOOPS:
        assert METHODS[name].reads_frames
        right = ref.reduce(name, reference_signals(arrays).replace(frames=4), 9).index_BK
        wrong = ref.reduce(name, reference_signals(arrays).replace(frames=1), 9).index_BK
        assert right.tolist() == kept_by(name, arrays, 4, 9) and not torch.equal(right, wrong)
