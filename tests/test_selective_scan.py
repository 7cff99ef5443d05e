"""Promises of the selective scan: blocks give what the loop over rows gives, in bounded memory.

The oracles are the reference's loop and its gradients, and mlx-lm's own layer.

Shapes: B prompts, L rows, D features, E inner features, S states of each.
"""

import mlx.core as mx
import numpy as np
import pytest
import torch

from benchmarks.launches import launches
from mlx_vlm_prune.models.language import selective_scan as scans
from torch_ref.models.language import selective_scan as reference

from .pruner_cases import close

B, E, S, BLOCK = 2, 24, 6, 8
READS = ["read_in_order", "read_in_chunks"]
LENGTHS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3)


@pytest.fixture(params=READS)
def read(request, monkeypatch):
    """Blocks of BLOCK rows, as on a CPU and as on a GPU."""
    function = getattr(scans, request.param)
    monkeypatch.setattr(scans, "_plan", lambda values: (BLOCK, function))
    return function


def arrays(L: int, seed: int = 0, delta: float = 0.3) -> list[np.ndarray]:
    """x, Δ, A, B, C and a state (B, E, S) to begin with."""
    draw = np.random.default_rng(seed)
    shapes = [(B, L, E), (B, L, E), (E, S), (B, L, S), (B, L, S), (B, E, S)]
    x, step, rate, into, out, state = (draw.normal(size=shape).astype("f4") for shape in shapes)
    return [x, delta * np.abs(step), -np.exp(rate), into, out, state]


def ours(values: list[np.ndarray], **options) -> tuple[np.ndarray, np.ndarray]:
    """y and the last state, (B, E, S)."""
    *values, state = (mx.array(value) for value in values)
    y_BLE, state_BSE = scans.selective_scan(*values, state.swapaxes(1, 2), **options)
    return np.array(y_BLE), np.array(state_BSE.swapaxes(1, 2))


def theirs(values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """By the loop, in float64."""
    y, state = reference.selective_scan(*(torch.tensor(v, dtype=torch.float64) for v in values))
    return y.numpy(), state.numpy()


@pytest.mark.parametrize("L", LENGTHS)
def test_blocks_give_what_the_loop_gives(L, read):
    for got, expected in zip(ours(arrays(L)), theirs(arrays(L)), strict=True):
        close(got, expected)


def test_without_a_state_it_begins_with_zeros(read):
    values = arrays(BLOCK + 3)
    values[-1] = np.zeros_like(values[-1])
    y_BLE, _ = scans.selective_scan(*(mx.array(value) for value in values[:-1]))
    np.testing.assert_array_equal(np.array(y_BLE), ours(values)[0])


@pytest.mark.parametrize("cut", (1, 5, BLOCK, 2 * BLOCK + 1))
def test_read_in_pieces_equals_read_at_once(cut, read):
    x, delta, A, into, out, state = arrays(3 * BLOCK)
    whole, last = ours([x, delta, A, into, out, state])
    first, state = ours([x[:, :cut], delta[:, :cut], A, into[:, :cut], out[:, :cut], state])
    rest, after = ours([x[:, cut:], delta[:, cut:], A, into[:, cut:], out[:, cut:], state])
    close(np.concatenate([first, rest], axis=1), whole)
    close(after, last)


def test_rows_without_a_step_leave_the_state(read):
    values = arrays(BLOCK + 3)
    values[1][:] = 0
    np.testing.assert_array_equal(ours(values)[1], values[-1])


@pytest.mark.parametrize("delta", (1e-7, 1e-3, 30, 1e5))
def test_slow_and_fast_decays_neither_overflow_nor_lose_their_rate(delta, read):
    """A quotient of cumulative decays would be infinite: e^(30 · 8 rows) is beyond float32."""
    values = arrays(40 * BLOCK, delta=delta)
    for got, expected in zip(ours(values), theirs(values), strict=True):
        assert np.isfinite(got).all()
        close(got, expected)


def test_half_precision_accumulates_in_float32(read):
    values = [value.astype("f2") for value in arrays(40 * BLOCK, delta=1e-2)]
    got, state = (mx.array(part) for part in ours(values))
    assert got.dtype == state.dtype == mx.float32
    close(np.array(got), theirs([value.astype("f4") for value in values])[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_the_loop(recompute, read):
    values = arrays(2 * BLOCK + 3)
    tensors = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]
    y, state = reference.selective_scan(*tensors)
    ((y**2).sum() + state.sum()).backward()

    def loss(*given):
        *given, state = given
        y, state = scans.selective_scan(*given, state.swapaxes(1, 2), recompute=recompute)
        return (y**2).sum() + state.sum()

    gradients = mx.grad(loss, list(range(6)))(*(mx.array(value) for value in values))
    for got, expected in zip(gradients, tensors, strict=True):
        close(np.array(got), expected.grad.numpy())


def test_memory_is_that_of_a_block():
    """The decays of all rows would take E · S values for each."""
    L, E, S = 4096, 256, 16
    x, delta, A = mx.ones((1, L, E)), mx.full((1, L, E), 0.1), -mx.ones((E, S))
    into = mx.ones((1, L, S))
    mx.eval(x, delta, A, into)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(scans.selective_scan(x, delta, A, into, into))
    assert mx.get_peak_memory() - before < L * E * S * 4 / 3


def test_a_gpu_is_asked_for_few_steps(monkeypatch):
    """In chunks side by side: not three launches and more for each of 1,024 rows."""
    monkeypatch.setattr(scans, "_plan", lambda values: (1024, scans.read_in_chunks))
    x, delta, into = mx.ones((1, 1024, E)), mx.ones((1, 1024, E)), mx.ones((1, 1024, S))
    y_BLE, _ = scans.selective_scan(x, delta, -mx.ones((E, S)), into, into)
    assert sum(launches([y_BLE]).values()) < 250


def test_powers_of_two_and_what_is_made_of_them():
    x = np.linspace(-140, 20, 300_001).astype("f4")
    with np.errstate(under="ignore"):
        power = np.exp2(np.maximum(x, -126).astype("f8"))
    got = np.array(scans.power_of_2(mx.array(x)))
    assert np.abs(got / power - 1).max() < 2e-7 and got[x == 0] == 1
    x64 = x.astype("f8")
    close(np.array(scans.softplus(mx.array(x))), np.logaddexp(0, x64))
    close(np.array(scans.silu(mx.array(x))), x64 / (1 + np.exp(-x64)))
    assert np.isnan(np.array(scans.power_of_2(mx.array([np.nan])))).all()


def running_sum(x):
    return x.cumsum(1)


def test_multi_resolution_by_hand():
    """x = 1 2 3 4 5, every second row: 1 3 5 sums to 1 4 9, each held until the next."""
    x_151 = mx.array([[[1.0], [2], [3], [4], [5]]])
    for gate, expected in ((1.0, [1, 1, 4, 4, 9]), (0.0, [1, 3, 6, 10, 15])):
        gates = mx.full(x_151.shape, gate)
        y = scans.multi_resolution_scan(running_sum, running_sum, x_151, gates, 2)
        assert y.flatten().tolist() == expected
    assert [scans.multi_resolution_updates(5, every) for every in (1, 2, 4)] == [10, 8, 7]


@pytest.mark.parametrize("every", (1, 2, 3, 4))
@pytest.mark.parametrize("L", (1, 4, 11))
def test_multi_resolution_equals_the_reference_and_looks_at_no_later_row(L, every):
    x, _, _, _, _, _ = arrays(L)
    gate = 1 / (1 + np.exp(-arrays(L, seed=1)[0]))
    args = running_sum, running_sum, mx.array(x), mx.array(gate), every
    got = np.array(scans.multi_resolution_scan(*args))
    tensors = torch.tensor(x), torch.tensor(gate)
    expected = reference.multi_resolution_scan(running_sum, running_sum, *tensors, every)
    close(got, expected.numpy())
    x[:, -1] += 1  # of the last row
    changed = scans.multi_resolution_scan(*args[:2], mx.array(x), *args[3:])
    np.testing.assert_array_equal(np.array(changed)[:, :-1], got[:, :-1])


def test_the_low_scan_learns():
    """In the notebook that it is from, no gradient reaches it."""
    x, gate = mx.array(arrays(7)[0]), mx.full((B, 7, E), 0.5)

    def loss(weight):
        y = scans.multi_resolution_scan(running_sum, lambda x: weight * x, x, gate, 2)
        return (y**2).sum()

    assert abs(mx.grad(loss)(mx.array(1.0)).item()) > 1
