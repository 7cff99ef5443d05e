"""Promises about what a GPU is asked to launch: few operations a step, compiled ones on a GPU only,
which come to the same. Counted in graphs that are built as for a GPU.

Shapes: B images, N tokens, K kept, H heads, S queries and keys, d head size, m rows of a block.
"""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import launches
from mlx_vlm_prune.models.towers import signals as tower_signals
from mlx_vlm_prune.pruners import apet, cdpruner, coverage, dart, divprune, numerics, prumerge
from mlx_vlm_prune.pruners.numerics import precision

from .pruner_cases import make_pruner

ROWS, K = 8, 16
PER_STEP = {"divprune": 3, "cdpruner": 7, "scope": 7, "mmtok": 7}  # launches of one kept token
AT_MOST = {
    "received_attention": 16, "hiprune": 40, "visionzip": 50, "prumerge": 55, "similarity": 30,
    "holov": 110, "global_local": 55, "dart": 85, "apet": 180, "tome": 24 * 50, "random": 5,
}  # fmt: skip


def count(spec: str, K: int = K, *, fuse: bool = True) -> int:
    return launches.of_method(make_pruner(spec), ROWS, K, fuse=fuse).total()


def test_views_cost_nothing_and_copies_are_counted():
    x_BN = mx.ones((2, 6)).reshape(3, 4)[:, 1:].T
    assert launches.launches([x_BN]) == {"Full": 1}
    padded = mx.pad(x_BN, [(0, 0), (1, 1)])
    both = launches.launches([mx.concatenate([padded, padded, padded], axis=1)])
    assert both == {"Full": 1, "Pad": 2, "Concatenate": 3}


@pytest.mark.parametrize("spec", PER_STEP)
def test_a_step_of_a_greedy_method_is_a_few_launches(spec):
    assert count(spec, K + 1) - count(spec) == PER_STEP[spec]


@pytest.mark.parametrize("spec", AT_MOST)
def test_a_method_is_no_more_launches_than(spec):
    assert count(spec) <= AT_MOST[spec]


def test_a_round_of_vispruner_is_seven_launches():
    assert count("vispruner:important=0") - count("vispruner:important=0", K + 8) == 7


@pytest.mark.parametrize("spec", launches.ABLE)
def test_fewer_are_launched_with_functions_compiled_and_on_a_cpu_none_is(spec):
    plain = launches.of_method(make_pruner(spec), ROWS, K, fuse=False)
    assert count(spec) < plain.total() or spec == "downsample"
    assert not [name for name in plain if name.startswith("Compiled")]


def random(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(len(shape)).random(shape, dtype=np.float32))


def calls(B: int, N: int) -> dict:
    """Each compiled function of more than two operations, with arguments."""
    i_B1, token_N = mx.full((B, 1), N // 2, mx.uint32), mx.arange(N, dtype=mx.uint32)
    x_BN, age_BN = random(B, N), mx.arange(N, dtype=mx.int32) // 2 % 3 + mx.zeros((B, 1), mx.int32)
    score_BN = mx.where(token_N < 2, cdpruner.KEPT, x_BN)
    state, row_BN = (score_BN, x_BN, random(B, N) / 2), random(B, N, 1)[..., 0]
    mask_BNN, number_BNN = random(B, N, N) > 0.5, mx.cumsum(mx.ones((B, N, N)), axis=-1)
    return {
        divprune.gaps_after: (x_BN, row_BN, i_B1, token_N),
        cdpruner.after_keeping: (i_B1, token_N, x_BN[:, :1], state, row_BN, x_BN / 9),
        cdpruner.with_row: (random(B, 4, N), random(B, 1, N), mx.arange(4)[:, None], mx.array([2])),
        coverage.scores: (x_BN, row_BN, age_BN, i_B1, token_N),
        coverage.uncovered: (random(B, N, N), random(B, 1, N)),
        apet.without: (random(B, N, 4), random(B, 1, 4), random(B, 1, 1), random(B, N, 1)),
        apet.squares: (random(B, N, 4), random(B, 1, 4)),
        dart.shares: (mx.arange(8), mx.full((B, 1), 5), mx.array(N)),
        prumerge.with_first_ties: (mask_BNN, ~mask_BNN, number_BNN, mx.full((B, N, 1), 3)),
        numerics.by_root: (random(B, N, 4), random(B, N, 1)),
        numerics.first_20_bits: (x_BN.view(mx.uint32),),
        numerics.rounded_cosine: (x_BN - 0.5,),
        numerics.powers: (x_BN, x_BN[:, :1], 0.2),
        numerics.between: (x_BN, x_BN[:, :1] - 1, x_BN[:, :1] + 1),
        numerics.is_finite: (mx.where(token_N == 1, mx.inf, x_BN),),
    }


def results(function, arguments: tuple, *, fuse: bool) -> list[np.ndarray]:
    with precision("float32", fuse=fuse):
        result = function(*arguments)
        result = list(result) if isinstance(result, tuple) else [result]
        mx.eval(result)
    return [np.array(array) for array in result]


@pytest.mark.skipif(not shutil.which("g++"), reason="MLX compiles with g++ on a CPU")
@pytest.mark.parametrize("first", [(1, 6), (1, 1)])
@pytest.mark.parametrize("function", calls(1, 4), ids=lambda f: f.__name__)
def test_a_compiled_function_gives_what_the_plain_one_gives_in_any_shape(function, first):
    options = {"any_shape": False} if function is cdpruner.after_keeping else {}
    traced = numerics.fused(function.__wrapped__, **options)  # again, in the first shape
    for shape in (first, (3, 5), (1, 1)):
        arguments = calls(*shape)[function]
        compiled, plain = (results(traced, arguments, fuse=fuse) for fuse in (True, False))
        for one, other in zip(compiled, plain, strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("most", [1, 4 * 2 * 41 * 20, 2**25])
def test_received_attention_is_the_same_in_chunks_of_any_size(most, monkeypatch):
    q_BHSd, k_BHSd = random(4, 2, 41, 8), random(4, 2, 41, 8)[..., ::-1]
    monkeypatch.setattr(tower_signals, "MOST_HELD", most)
    with precision("float32"):
        received_BS = tower_signals.received_attention(q_BHSd, k_BHSd, None)
    chunks = launches.launches([received_BS])["Softmax"]
    expected_BS = tower_signals.attention(q_BHSd, k_BHSd, None).mean(axis=1)
    np.testing.assert_allclose(np.array(received_BS), np.array(expected_BS), rtol=1e-5)
    assert chunks == {1: 3, 4 * 2 * 41 * 20: 3, 2**25: 1}[most]


def test_the_command_counts_and_ends_in_json(capsys):
    launches.main(["--pruner", "norm", "--pruner", "divprune", "--rows", "4", "8", "--operations"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["tokens"] == [16, 64]
    assert [row["pruner"] for row in result["rows"]] == ["norm", "divprune"]
    (few, many), step = result["rows"][1]["launches"], PER_STEP["divprune"]
    assert many - few == 12 * step
