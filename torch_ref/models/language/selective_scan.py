"""The selective scan of Mamba by its definition: one row after the other.

Shapes: B prompts, L rows, D features, E inner features, S states of each.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def selective_scan(
    x_BLE: Tensor, delta_BLE: Tensor, A_ES: Tensor, B_BLS: Tensor, C_BLS: Tensor,
    state_BES: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, L, E) of all rows, and the state (B, E, S) after the last."""
    B, L, E = x_BLE.shape
    state = x_BLE.new_zeros(B, E, A_ES.shape[1]) if state_BES is None else state_BES
    outputs = []
    for t in range(L):
        delta_BE1 = delta_BLE[:, t, :, None]
        decay_BES = torch.exp(delta_BE1 * A_ES)
        state = decay_BES * state + delta_BE1 * B_BLS[:, t, None] * x_BLE[:, t, :, None]
        outputs.append((state * C_BLS[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1), state


def scan_by_heads(
    x_BLHd: Tensor, delta_BLH: Tensor, A_H: Tensor, B_BLGS: Tensor, C_BLGS: Tensor,
    state_BHdS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mamba-2's: a head's features share Δ and A, and the heads of a group share B and C.

    y (B, L, H, d) of all rows, and the state (B, H, d, S) after the last.
    """
    B, L, H, d = x_BLHd.shape
    G, S = B_BLGS.shape[2:]
    B_BLHS, C_BLHS = (x.repeat_interleave(H // G, dim=2) for x in (B_BLGS, C_BLGS))
    state = x_BLHd.new_zeros(B, H, d, S) if state_BHdS is None else state_BHdS
    outputs = []
    for t in range(L):
        decay_BH11 = torch.exp(delta_BLH[:, t] * A_H)[..., None, None]
        input_BHd1 = (delta_BLH[:, t, :, None] * x_BLHd[:, t])[..., None]
        state = decay_BH11 * state + input_BHd1 * B_BLHS[:, t, :, None]
        outputs.append((state * C_BLHS[:, t, :, None]).sum(-1))
    return torch.stack(outputs, dim=1), state


def multi_resolution_scan(
    scan: Callable[[Tensor], Tensor], low_scan: Callable[[Tensor], Tensor],
    x_BLD: Tensor, gate_BLD: Tensor, every: int,
) -> Tensor:  # fmt: skip
    """y_t = g_t · low_t' + (1 - g_t) · high_t, where t' is the last of every r-th row up to t."""
    last_L = torch.arange(x_BLD.shape[1], device=x_BLD.device) // every
    low_BLD = low_scan(x_BLD[:, ::every])[:, last_L]
    return gate_BLD * low_BLD + (1 - gate_BLD) * scan(x_BLD)
