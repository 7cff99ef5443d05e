"""Layers of Mamba-2 (arXiv:2405.21060): as Mamba's, with a state for each head, below pruned rows.

A head's features share one step and one decay, so that rows can be read in chunks by products of
matrices, as mlx-lm's own `ssm_attn` does. mlx-lm's modules are called one by one, so that padding
changes no state. With more than one group it computes another norm than the models were trained
with: each group has its own, as in the authors' code (github.com/state-spaces/mamba, `RMSNorm` of
its `Mamba2`).

Shapes: B prompts, L new rows, D features, E inner features in H heads of d, G groups of heads, S
states of a feature, C features of the convolution: E, and each group's S twice.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .mamba import (
    MambaState,
    convolve,
    in_pieces,
    is_real,
    run_block,
    stock_module,
    to_be_timed,
)
from .selective_scan import silu

ANY_STEP = (0.0, float("inf"))  # limits of a step's length that limit nothing
KERNEL_STATES = 32  # mlx-lm's kernel for one row reads states by so many


def block(layer: Any, x_BLD: mx.array, forward_pass: Any, state: MambaState) -> mx.array:
    """One layer."""
    return run_block(mix_piece, layer, x_BLD, forward_pass, state)


def mix(mixer: Any, x_BLD: mx.array, state: MambaState, padding: Sequence[int] = ()) -> mx.array:
    """What mlx-lm's `Mamba2Block` computes, from a state on."""
    return in_pieces(mix_piece, mixer, x_BLD, state, padding)


def mix_piece(
    mixer: Any, x_BLD: mx.array, state: MambaState, padding_B: mx.array | None
) -> mx.array:
    """Some rows of Mamba-2's."""
    E, G, S = mixer.intermediate_size, mixer.n_groups, mixer.ssm_state_size
    parts = mx.split(mixer.in_proj(x_BLD), [E, E + mixer.conv_dim], axis=-1)
    gate_BLE, x_BLC, step_BLH = parts
    inner_BLC = silu(convolve(mixer.conv1d, x_BLC, state, padding_B))
    x_BLE, B_BLGS, C_BLGS = mx.split(inner_BLC, [E, E + G * S], axis=-1)
    B_BLGS, C_BLGS = (mx.unflatten(x, -1, (G, S)) for x in (B_BLGS, C_BLGS))
    y_BLHd, state.scanned = scan(
        mixer, mx.unflatten(x_BLE, -1, (mixer.num_heads, mixer.head_dim)), step_BLH,
        B_BLGS, C_BLGS, state.scanned, padding_B,
    )  # fmt: skip
    y_BLE = y_BLHd.flatten(2) * silu(gate_BLE)
    y_BLGe = mx.unflatten(y_BLE, -1, (G, E // G))
    normed_BLE = mx.fast.rms_norm(y_BLGe, None, mixer.norm.eps).flatten(2) * mixer.norm.weight
    return mixer.out_proj(normed_BLE.astype(x_BLD.dtype))


def scan(
    mixer: Any, x_BLHd: mx.array, step_BLH: mx.array, B_BLGS: mx.array, C_BLGS: mx.array,
    state_BHdS: mx.array | None, padding_B: mx.array | None,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """Rows (B, L, H, d) and the state (B, H, d, S) after the last, by mlx-lm's functions."""
    ssm = stock_module("ssm")
    has_kernel = padding_B is None and mixer.ssm_state_size % KERNEL_STATES == 0
    read = ssm.ssm_update if has_kernel else ssm.ssm_attn
    mask_BL = None if padding_B is None else is_real(padding_B, x_BLHd.shape[1])
    rows: tuple[mx.array, mx.array] = read(
        x_BLHd, mixer.A_log, B_BLGS, C_BLGS, mixer.D, step_BLH, mixer.dt_bias, state_BHdS,
        mixer.time_step_limit, mask_BL,
    )  # fmt: skip
    return rows


def random_mixer_2(hidden_size: int, state_size: int, head_dim: int) -> Any:
    """mlx-lm's `Mamba2Block` with random weights, as wide inside as Mamba's, to be timed."""
    module = stock_module("mamba2")
    sizes = module.ModelArgs(
        model_type="mamba2", vocab_size=1, hidden_size=hidden_size, num_hidden_layers=1,
        num_heads=2 * hidden_size // head_dim, head_dim=head_dim, n_groups=1,
        intermediate_size=2 * hidden_size, state_size=state_size, conv_kernel=4, use_bias=False,
        use_conv_bias=True, tie_word_embeddings=True, layer_norm_epsilon=1e-5,
        time_step_limit=ANY_STEP, time_step_rank="auto",
    )  # fmt: skip
    return to_be_timed(module.Mamba2Block(sizes, 0))
