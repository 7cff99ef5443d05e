"""Efficient Video Sampling (arXiv:2510.14624): the tokens that differ most from the frame before.

Of the first frame, those that differ most from its mean direction, at most `first` of K.
"""

import math

import torch
from torch import Tensor

from .contract import Reduction, Signals
from .numerics import keep_highest


def prune(signals: Signals, K: int, first: float = 0.5) -> Reduction:
    index = [_of_clip(x_ND, signals.frames, K, first) for x_ND in signals.x_BND]
    return Reduction(torch.stack(index))


def _of_clip(x_ND: Tensor, T: int, K: int, first: float) -> Tensor:
    frames = [_unit(frame_nD) for frame_nD in x_ND.double().chunk(T)]
    n = len(frames[0])
    quota = min(n, max(math.ceil(K / T), math.floor(first * K)))
    mean_1D = _unit(frames[0].mean(dim=0, keepdim=True))
    kept = [keep_highest(_change(frames[0], mean_1D)[None], quota)[0]]
    if T > 1:
        pairs = zip(frames[1:], frames[:-1], strict=True)
        change_M = torch.cat([_change(frame, before) for frame, before in pairs])
        kept.append(n + keep_highest(change_M[None], K - quota)[0])
    return torch.cat(kept)


def _unit(x_nD: Tensor) -> Tensor:
    return x_nD / x_nD.norm(dim=-1, keepdim=True).clamp(min=1e-6)


def _change(u_nD: Tensor, v_nD: Tensor) -> Tensor:
    return 1 - (u_nD * v_nD).sum(dim=-1).round(decimals=12)
