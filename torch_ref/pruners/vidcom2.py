"""VidCom2 (arXiv:2505.14454): what is unlike its frame and its clip, more of frames that are so.

Frames take turns: the token of rank r in a frame of weight w has its turn at (r + 1/2) / w, and
each frame's first before all others.
"""

import torch
from torch import Tensor

from .contract import Reduction, Signals, index_reduction

SCALES = [2.0**power for power in range(-3, 2)]


def prune(signals: Signals, K: int, temperature: float = 0.01) -> Reduction:
    clips = [x_ND.double() for x_ND in signals.x_BND]
    return index_reduction(signals, [_of_clip(x, signals.frames, K, temperature) for x in clips])


def _of_clip(x_ND: Tensor, T: int, K: int, temperature: float) -> list[int]:
    variance_D = x_ND.var(dim=0, unbiased=False).round(decimals=12)
    quiet = variance_D.argsort(stable=True)[: max(1, len(variance_D) // 2)].sort().values
    x_NC = x_ND[:, quiet]
    u_NC = x_NC / x_NC.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    frames = list(u_NC.chunk(T))
    like_clip = [_gaussians(frame, u_NC.mean(dim=0)) for frame in frames]
    like_frame = [_gaussians(frame, frame.mean(dim=0)) for frame in frames]
    distinct_T = -torch.stack([like.mean() for like in like_clip])
    weight_T = (1 + (distinct_T / temperature).softmax(dim=0) - 1 / T).round(decimals=12)
    turns, n = [], len(frames[0])
    for t, weight in enumerate(weight_T.tolist()):
        score_n = (like_clip[t] + like_frame[t]).round(decimals=12)
        for rank, token in enumerate(score_n.argsort(stable=True).tolist()):
            at = (rank + 0.5) / weight if rank else -weight
            turns.append((at, t * n + token))
    return sorted(token for _, token in sorted(turns)[:K])


def _gaussians(u_nC: Tensor, centre_C: Tensor) -> Tensor:
    square_n = (u_nC - centre_C).square().sum(dim=-1)
    return torch.stack([(-square_n / (2 * scale)).exp() for scale in SCALES]).sum(dim=0)
