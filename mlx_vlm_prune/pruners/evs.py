"""Keep what changed since the frame before.

Efficient Video Sampling, Bagrov et al., arXiv:2510.14624. A token's score is 1 - cos(x, y), where y
is the token at the same place in the frame before; the K highest of the whole clip stay. The first
frame has none before it. In the paper it stays whole: all others share what is left, nothing where
K is no more than a frame. Here its part of K is limited, and within it a token's score is 1 - cos
to the mean direction of its frame, as it is for the one frame of a picture.

As the authors' code (github.com/vllm-project/vllm@094f117) with first=1. Differs: without that
option the first frame gets no more than half; K may be less than a frame, which is what theirs
keeps at least, and then tokens of the first are chosen by their distance from its mean.

Options:
    first: the largest share of K that the first frame gets, where that is no less than an even one

Shapes: B clips, T frames of n tokens, N = Tn, K kept, D features.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage
from .numerics import choosing, constant, keep_highest, rounded_cosine, unit

stage = Stage.PROJECTED
needs: dict[str, str | None] = {"grid": None}
reads_frames = True


def prune(signals: Signals, K: int, *, first: float = 0.5) -> Reduction:
    """Keep K."""
    if not 0 <= first <= 1:
        raise ValueError(f"first is {first:g}; it must be from 0 to 1")
    T, (B, N, _) = signals.frames, signals.x_BND.shape
    n = N // T
    whole = first_frame_budget(n, T, K, first)
    with choosing():
        u_BTnD = unit(signals.x_BND).reshape(B, T, n, -1)
        first_Bn = changes(u_BTnD[:, 0], unit(u_BTnD[:, 0].mean(axis=1, keepdims=True)))
        later_Bm = changes(u_BTnD[:, 1:], u_BTnD[:, :-1]).reshape(B, -1)
        parts = [keep_highest(first_Bn, whole)]
        if T > 1:
            parts.append(n + keep_highest(later_Bm, K - whole))
        return Reduction(mx.concatenate(parts, axis=1))


def first_frame_budget(n: int, T: int, K: int, first: float) -> int:
    """How many of K tokens are the first frame's: an even share or `first`, whichever is more."""
    return min(n, max(-(-K // T), int(first * K)))


def changes(u: mx.array, before: mx.array) -> mx.array:
    """1 - cos of unit tokens (…, D) with others."""
    return constant(1) - rounded_cosine((u * before).sum(axis=-1))
