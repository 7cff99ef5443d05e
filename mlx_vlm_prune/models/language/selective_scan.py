"""The selective scan of Mamba (arXiv:2312.00752): rows read in order into a state of fixed size.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t        y_t = C_t h_t        A < 0 < Δ

Rows go in blocks. What needs no earlier row, the decays exp(Δ A) and the inputs Δ B x, is computed
for a whole block at once. Then states follow one another: on a CPU row by row, each step one pass
over values that are still in the cache; on a GPU in chunks side by side, so that a block of T
rows takes 2√T steps and not T. Memory is that of a block. All decays are products of numbers below
1, never quotients, so nothing overflows; states are float32 whatever the rows are.

Shapes: B prompts, L rows, T rows of a block, G chunks of U rows, E features, S states of each.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from ...machine.hardware import on_cpu

# Values of a block: the CPU's cache, of one core, holds some such arrays; a GPU wants many values.
BLOCK_VALUES_CPU, BLOCK_VALUES_GPU = 1 << 18, 1 << 25
MOST_ROWS_CPU, MOST_ROWS_GPU = 64, 1024
LN2 = math.log(2)
# A float32 that this is added to is rounded to a whole number, in its lowest bits (it is a multiple
# of 512). MLX 0.31 compiles the first seven digits of a constant only.
ROUND = 12_582_400.0
SMALLEST = -126.0  # the exponent of the smallest normal float32

Read = Callable[[mx.array, mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]


def selective_scan(
    x_BLE: mx.array, delta_BLE: mx.array, A_ES: mx.array, B_BLS: mx.array, C_BLS: mx.array,
    state_BSE: mx.array | None = None, *, recompute: bool = False,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """y (B, L, E) of all rows and the state (B, S, E) after the last, both float32.

    A row with Δ = 0 leaves the state as it is. `recompute` keeps no block's arrays for gradients
    and computes them once more.
    """
    B, L, E = x_BLE.shape
    S = A_ES.shape[1]
    if state_BSE is None:
        state_BSE = mx.zeros((B, S, E), mx.float32)
    rows, read = _plan(B * S * E)
    block = mx.checkpoint(_block(read)) if recompute else _block(read)
    rate_SE = A_ES.astype(mx.float32).T / LN2  # of powers of 2
    # Time goes first, so that a row is in one piece.
    arrays = [x.astype(mx.float32).swapaxes(0, 1) for x in (x_BLE, delta_BLE, B_BLS, C_BLS)]
    outputs: list[mx.array] = []
    for begin in range(0, L, rows):
        part = [x[begin : begin + rows] for x in arrays]
        if outputs:  # MLX would compute all blocks' decays first, and their outputs last
            part = mx.depends(part, [outputs[-1], state_BSE])
        y_TBE, state_BSE = block(*part, rate_SE, state_BSE)
        outputs.append(y_TBE)
    return mx.concatenate(outputs).swapaxes(0, 1), state_BSE


def _plan(values: int) -> tuple[int, Read]:
    """Rows of a block, of so many values each, and how its states are computed."""
    if on_cpu():
        return min(max(BLOCK_VALUES_CPU // values, 1), MOST_ROWS_CPU), read_in_order
    return min(max(BLOCK_VALUES_GPU // values, 1), MOST_ROWS_GPU), read_in_chunks


def _block(read: Read) -> Callable[..., tuple[mx.array, mx.array]]:
    """A block's y (T, B, E) and the state (B, S, E) after it."""

    def block(
        x_TBE: mx.array, delta_TBE: mx.array, B_TBS: mx.array, C_TBS: mx.array,
        rate_SE: mx.array, state_BSE: mx.array,
    ) -> tuple[mx.array, mx.array]:  # fmt: skip
        decay_TBSE = power_of_2(delta_TBE[:, :, None] * rate_SE)
        input_TBSE = B_TBS[..., None] * (delta_TBE * x_TBE)[:, :, None]
        return read(decay_TBSE, input_TBSE, C_TBS[:, :, None], state_BSE)

    return block


def power_of_2(x: mx.array) -> mx.array:
    """2 to the x for x < 128, float32, to 1e-7 of the value; below -126 as for -126.

    MLX's own exponential takes ten times as long on a CPU (docs/log.md).
    """
    power: Any = _power(x)
    return power


@mx.custom_function
def _power(x: mx.array) -> mx.array:
    return _power_by_bits(x) if on_cpu() else mx.exp(x * LN2)


@_power.vjp
def _power_gradient(x: mx.array, cotangent: mx.array, value: mx.array) -> mx.array:
    return cotangent * value * LN2


@mx.compile
def _power_by_bits(x: mx.array) -> mx.array:
    """The whole part becomes the exponent's bits; the rest f is within ±1/2.

    2^f = (R + f) / (R - f) with R = f coth(f ln2 / 2), which is even and smooth: three terms of its
    series are enough. It is 1 at f = 0 and its slope is right, so slow decays keep their rate.
    """
    x = mx.maximum(x, SMALLEST)
    rounded = x + ROUND
    whole = mx.left_shift(rounded.view(mx.int32) + 127, 23).view(mx.float32)
    f = x - (rounded - ROUND)
    square = f * f
    R = (square * (-(LN2**3) / 360) + LN2 / 6) * square + 2 / LN2
    return (R + f) / (R - f) * whole


def softplus(x: mx.array) -> mx.array:
    """log(1 + exp(x)), float32."""
    x = x.astype(mx.float32)
    return _add_log(x, power_of_2(-mx.abs(x) / LN2))


@partial(mx.compile, shapeless=True)
def _add_log(x: mx.array, low: mx.array) -> mx.array:
    """max(x, 0) + log(1 + low) for low from 0 to 1, by the series of 2 artanh(low / (2 + low))."""
    s = low / (2 + low)
    square, series = s * s, mx.array(1 / 13)
    for odd in (11, 9, 7, 5, 3, 1):
        series = series * square + 1 / odd
    return mx.maximum(x, 0) + 2 * s * series


def silu(x: mx.array) -> mx.array:
    """x / (1 + exp(-x)), float32."""
    x = x.astype(mx.float32)
    low = power_of_2(-mx.abs(x) / LN2)
    return x * mx.maximum(low, mx.sign(x)) / (1 + low)


def read_in_order(
    decay_TBSE: mx.array, input_TBSE: mx.array, C_TB1S: mx.array, state_BSE: mx.array
) -> tuple[mx.array, mx.array]:
    """y (T, B, E) and the last state, a row at a time."""
    states = _states(decay_TBSE, input_TBSE, state_BSE[None])
    pairs = zip(_rows(C_TB1S), states, strict=True)
    return mx.concatenate([C @ state for C, state in pairs])[:, :, 0], states[-1][0]


def read_in_chunks(
    decay_TBSE: mx.array, input_TBSE: mx.array, C_TB1S: mx.array, state_BSE: mx.array
) -> tuple[mx.array, mx.array]:
    """The same: all chunks a row at a time from an empty state, side by side, then from chunk to
    chunk, then what each chunk began with is added to its rows."""
    T = len(decay_TBSE)
    U = math.ceil(math.sqrt(T))
    decay_UGBSE = _chunks(decay_TBSE, U, 1.0)
    input_UGBSE, C_UGB1S = (_chunks(x, U, 0.0) for x in (input_TBSE, C_TB1S))
    own_UGBSE = mx.concatenate(_states(decay_UGBSE, input_UGBSE, mx.zeros_like(input_UGBSE[:1])))
    through_UGBSE = mx.cumprod(decay_UGBSE, axis=0)
    after = _states(through_UGBSE[-1], own_UGBSE[-1], state_BSE[None])
    before_GBSE = mx.concatenate([state_BSE[None], *after[:-1]])
    y_UGB1E = C_UGB1S @ (own_UGBSE + through_UGBSE * before_GBSE)
    return y_UGB1E[:, :, :, 0].swapaxes(0, 1).flatten(0, 1)[:T], after[-1][0]


def _chunks(x_TB: mx.array, U: int, padding: float) -> mx.array:
    """Rows (U, G, …) of chunks side by side; the last one is filled up."""
    G = -(-len(x_TB) // U)
    widths = [(0, G * U - len(x_TB))] + [(0, 0)] * (x_TB.ndim - 1)
    filled = mx.pad(x_TB, widths, constant_values=padding)
    return mx.unflatten(filled, 0, (G, U)).swapaxes(0, 1)


def _states(decays: mx.array, inputs: mx.array, state: mx.array) -> list[mx.array]:
    """The state (1, …) after each of the rows."""
    states = []
    for decay, value in zip(_rows(decays), _rows(inputs), strict=True):
        state = _step(decay, state, value)
        states.append(state)
    return states


def _rows(x: mx.array) -> list[mx.array]:
    return list(mx.split(x, len(x))) if len(x) > 1 else [x]


def _step(decay: mx.array, state: mx.array, value: mx.array) -> mx.array:
    return decay * state + value


def multi_resolution_scan(
    scan: Callable[[mx.array], mx.array], low_scan: Callable[[mx.array], mx.array],
    x_BLD: mx.array, gate_BLD: mx.array, every: int,
) -> mx.array:  # fmt: skip
    """y = g · Up(low_scan(x[::r])) + (1 - g) · scan(x) with r = `every`: multi-resolution
    selective scanning, as github.com/denis7-jean/ece1512-projectA means it.

    Up holds each of the low scan's rows until the next, so that a row depends on none after it.
    """
    low_BLD = mx.repeat(low_scan(x_BLD[:, ::every]), every, axis=1)[:, : x_BLD.shape[1]]
    return gate_BLD * low_BLD + (1 - gate_BLD) * scan(x_BLD)


def multi_resolution_updates(rows: int, every: int) -> int:
    """State updates of a multi-resolution scan; a plain one has as many as rows."""
    return rows + -(-rows // every)
