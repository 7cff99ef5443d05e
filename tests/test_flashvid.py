"""FlashVID against loops, its twin, and small clips worked out by hand.

Shapes: B clips, T frames of n tokens, N = Tn, K kept, D features.
"""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings

import torch_ref.pruners as ref
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.pruners import Signals
from mlx_vlm_prune.pruners.numerics import precision

from .pruner_cases import case, make_pruner, reference_signals, signals
from .test_clips import Vector, best, clips, dot, mean, unit

pytestmark = pytest.mark.usefixtures("on_the_cpu_in_float64")
SPECS = [
    "flashvid", "flashvid:segments=1", "flashvid:segments=2,merge=0", "flashvid:alpha=0,segments=1",
    "flashvid:alpha=1", "flashvid:alpha=0.2,cut=-1,merge=-1,segments=1",
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=30, deadline=None)
@given(clip=clips())
def test_twins_and_loops_merge_the_same_and_clips_do_not_know_each_other(spec, clip):
    arrays, T, K = clip
    pruner = make_pruner(spec)
    kept = pruner(signals(arrays).replace(frames=T), K)
    twin = ref.reduce(pruner.name, reference_signals(arrays).replace(frames=T), K, **pruner.options)
    assert kept.index_BK.tolist() == twin.index_BK.tolist()
    x_BND, attention_BN = arrays["x_BND"], arrays["received_attention_BN"]
    B, N, _ = x_BND.shape
    weight_BKN = np.array(kept.mixture(N))
    if twin.weight_BKN is not None:
        np.testing.assert_allclose(weight_BKN, twin.weight_BKN.numpy(), atol=1e-6)
    for b in range(B):
        if K < N:
            x, attention = (a[b].astype(float).tolist() for a in (x_BND, attention_BN))
            weights = by_loops(x, attention, T, K, **pruner.options)
            assert kept.index_BK[b].tolist() == [centre for centre, _ in weights]
            np.testing.assert_allclose(weight_BKN[b], [w for _, w in weights], atol=1e-6)
        alone = {k: v if k == "grid" else v[b : b + 1] for k, v in arrays.items()}
        one = pruner(signals(alone).replace(frames=T), K)
        assert one.index_BK.tolist() == [kept.index_BK[b].tolist()]
        assert np.array(one.mixture(N)).tobytes() == weight_BKN[b : b + 1].tobytes()


def by_loops(
    x: list[Vector], attention: Vector, T: int, K: int, alpha=0.7, cut=0.9, merge=0.8, segments=8
) -> list[tuple[int, Vector]]:
    """Each slot's token and weights."""
    N, n = len(x), len(x) // T
    units = [unit(v) for v in x]
    frames = [list(range(t * n, t * n + n)) for t in range(T)]
    budget = [(t + 1) * K // T - t * K // T for t in range(T)]
    counts = [math.ceil(round(alpha * k, 9)) for k in budget]
    chosen = [c for t in range(T) for c in greedy(units, attention, frames[t], counts[t])]
    free = [[i for i in frame if i not in chosen] for frame in frames]
    middle = [unit(mean([x[i] for i in frame])) for frame in frames]
    alike = {t: -dot(middle[t - 1], middle[t]) for t in range(1, T)}
    begins = [0, *{*best(alike, segments - 1), *(t for t in alike if -alike[t] < cut)}]
    weights = {i: [float(i == j) for j in range(N)] for i in chosen}
    for begin in begins:
        end = min([t for t in begins if t > begin], default=T)
        quota = sum(budget[t] - counts[t] for t in range(begin, end))
        similar, above = {}, {}
        for t in range(begin + 1, end):
            for i in free[t]:
                options = {j: dot(units[i], units[j]) for j in free[t - 1]}
                if options and max(options.values()) > merge:
                    (above[i],) = best(options, 1)
                    similar[i] = options[above[i]]
        joins = best(similar, sum(len(free[t]) for t in range(begin, end)) - quota)
        branches = {i: [i] for t in range(begin, end) for i in free[t]}
        for i in sorted(joins, reverse=True):  # the latest frame first
            branches[above[i]] += branches.pop(i)
        roots = [[i for i in free[t] if i in branches] for t in range(begin, end)]
        for count, some in zip(hamilton([len(r) for r in roots], quota), roots, strict=True):
            middles = {i: mean([x[j] for j in branches[i]]) for i in some}
            for centre, members in clustered(middles, count).items():
                weights[centre] = [0.0] * N
                for i in members:
                    for j in branches[i]:
                        weights[centre][j] = 1 / len(members) / len(branches[i])
    return sorted(weights.items())


def greedy(units, attention, frame: list[int], count: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(count):
        score = {}
        for i in frame:
            others = [j for j in (chosen or frame) if j != i]
            gap = min((1 - dot(units[i], units[j]) for j in others), default=1.0)
            score[i] = round(attention[i] * gap, 12) if i not in chosen else -1.0
        chosen += best(score, 1)
    return chosen


def hamilton(parts: list[int], quota: int) -> list[int]:
    """Seats by largest remainders."""
    exact = {t: part * quota / max(sum(parts), 1) for t, part in enumerate(parts)}
    seats = [math.floor(round(e, 9)) for e in exact.values()]
    rest = {t: round(exact[t] - seats[t], 9) for t in exact}
    for t in best(rest, quota - sum(seats)):
        seats[t] += 1
    return seats


def clustered(points: dict[int, Vector], count: int) -> dict[int, list[int]]:
    if not count:
        return {}
    apart = {(i, j): distance(p, q) for i, p in points.items() for j, q in points.items()}
    density = {}
    for i in points:
        near = sorted(apart[i, j] for j in points)[: min(count, 7)]
        density[i] = round(-sum(d * d for d in near) / len(near), 12)  # its log
    score = {}
    for i in points:
        denser = [j for j in points if (-density[j], j) < (-density[i], i)]
        reach = min((apart[i, j] for j in denser), default=max(apart.values()))
        score[i] = round(density[i] + math.log(max(reach, 1e-12)), 12)
    centres = best(score, count)
    home = {i: i if i in centres else min(centres, key=lambda c: (apart[i, c], c)) for i in points}
    return {c: [i for i in points if home[i] == c] for c in centres}


def distance(p: Vector, q: Vector) -> float:
    return round(math.sqrt(sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / len(p)), 9)


def clip_of(*frames: list[Vector], attention: Vector | None = None) -> Signals:
    """A clip of frames one token high."""
    x = np.array(frames, dtype=np.float32).reshape(1, -1, len(frames[0][0]))
    attention_N = np.array(attention or [1.0] * x.shape[1], np.float32)
    grid = (len(frames), len(frames[0]))
    return Signals(
        mx.array(x), grid, frames=len(frames), received_attention_BN=mx.array(attention_N[None])
    )


A, B, C, Z = [2.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 2.0, 0], [0, 0, 0, 2.0]


def test_a_tree_grows_over_the_frames_that_show_the_same_and_ends_where_they_do_not():
    """Three frames of three tokens: A stands still, B leaves for Z in the third. Of four slots all
    are clusters; the tokens are four roots then, two of trees over three frames and one of two."""
    tokens = clip_of([A, B, C], [A, B, C], [A, Z, C])
    kept = make_pruner("flashvid:alpha=0,segments=1,cut=-1")(tokens, 4)
    assert kept.index_BK.tolist() == [[0, 1, 2, 7]]
    third, half = [1 / 3, 0, 0] * 3, [0, 1 / 2, 0, 0, 1 / 2, 0, 0, 0, 0]
    expected = [third, half, [0, 0, *third[:-2]], [0, 0, 0, 0, 0, 0, 0, 1, 0]]
    np.testing.assert_allclose(np.array(kept.mixture(9))[0], expected, atol=1e-7)
    # Cut between the second frame and the third, whose means have the cosine 2/3: trees end there.
    kept = make_pruner("flashvid:alpha=0,segments=1,cut=0.7")(tokens, 6)
    # The first segment has four slots, so two of the second frame join; the third's C joins its A.
    assert kept.index_BK.tolist() == [[0, 1, 2, 5, 6, 7]]
    assert np.array(kept.mixture(9))[0, 4].tolist() == [0, 0, 0, 0, 0, 0, 0.5, 0, 0.5]


@pytest.mark.parametrize("K, by_frame", [(2, [0, 1, 0, 1]), (6, [1, 2, 1, 2])])
def test_a_budget_is_spread_over_the_whole_clip(K, by_frame):
    tokens = clip_of(*([A, B, C] for _ in range(4)))
    kept = make_pruner("flashvid:alpha=1")(tokens, K).index_BK[0].tolist()
    assert [sum(i // 3 == t for i in kept) for t in range(4)] == by_frame


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_tokens_far_apart_are_clustered_as_near_ones_are(dtype):
    """Densities of the first would be 0, and the tokens of the lowest indices their centres."""
    x = np.random.default_rng(0).normal(size=(1, 64, 16)).astype(np.float32)
    share = mx.array(np.full((1, 64), 1 / 64, np.float32))
    with precision(dtype):
        tokens = Signals(mx.array(30 * x), (8, 8), received_attention_BN=share)
        kept = make_pruner("flashvid:alpha=0")(tokens, 16).index_BK[0].tolist()
    assert kept == FAR_APART != list(range(16))


FAR_APART = [1, 19, 20, 23, 24, 31, 36, 45, 50, 51, 52, 54, 55, 57, 62, 63]


def test_as_many_roots_stay_as_there_are_slots():
    """Two frames that are the same, of three tokens: of five slots only one token may join."""
    kept = make_pruner("flashvid:alpha=0,segments=1")(clip_of([A, B, C], [A, B, C]), 5)
    assert kept.index_BK.tolist() == [[0, 1, 2, 4, 5]]
    assert np.array(kept.mixture(6))[0, 0].tolist() == [0.5, 0, 0, 0.5, 0, 0]


def test_attention_times_distance_chooses():
    """Of one frame; A is near to A' and has most attention, Z is far from all and has little."""
    near = [2.0, 0.5, 0, 0]
    tokens = clip_of([A, near, C, Z], attention=[0.5, 0.3, 0.15, 0.05])
    assert make_pruner("flashvid:alpha=1")(tokens, 1).index_BK.tolist() == [[2]]  # 0.15 x 1
    assert make_pruner("flashvid:alpha=1")(tokens, 2).index_BK.tolist() == [[0, 2]]  # then 0.5 x 1


def test_keeping_a_whole_clip_is_the_identity_bit_for_bit():
    arrays = case("random", 1, (8, 3), 1)
    for spec in SPECS:
        kept = make_pruner(spec)(signals(arrays).replace(frames=4), 24)
        same = np.array(kept.tokens(mx.array(arrays["x_BND"])))
        assert same.tobytes() == arrays["x_BND"].tobytes()


def test_the_same_tokens_as_ever_are_kept_of_a_clip():
    """A memory, looked at once: six frames of 2 x 3 tokens."""
    i, d = np.meshgrid(np.arange(36), np.arange(8), indexing="ij")
    x = np.sin(0.3 * i + 1.1 * d + 0.37 * i * d + 0.01 * i * i)[None].astype(np.float32)
    share = ((np.arange(36) * 7 % 11 + 1) / 216)[None].astype(np.float32)
    tokens = Signals(mx.array(x), (12, 3), frames=6, received_attention_BN=mx.array(share))
    kept = make_pruner("flashvid:alpha=0.3,segments=2,merge=0.3,cut=-1")(tokens, 9)
    assert kept.index_BK.tolist() == [GOLDEN]


GOLDEN = [0, 3, 6, 12, 17, 20, 24, 25, 34]


@pytest.mark.parametrize("option, sentence", [
    ("alpha=1.5", "flashvid: alpha is 1.5; it must be from 0 to 1"),
    ("cut=2", "flashvid: cut is 2; it is a cosine, from -1 to 1"),
    ("merge=-2", "flashvid: merge is -2; it is a cosine, from -1 to 1"),
    ("segments=0", "flashvid: segments is 0; it must be 1 or more"),
])  # fmt: skip
def test_options_out_of_range_are_refused(option, sentence):
    with pytest.raises(UserError, match=sentence):
        make_pruner(f"flashvid:{option}")(signals(case("random", 1, (4, 2), 0)), 3)
