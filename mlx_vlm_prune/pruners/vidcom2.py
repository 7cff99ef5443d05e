"""Keep what differs from its frame and from the clip; frames that differ more keep more.

VidCom2, Liu et al., EMNLP 2025, arXiv:2505.14454. In the half of the channels that varies least,
unit tokens are compared with the mean of the clip and of their frame: g(d) = sum of
exp(-d^2 / 2a) over a = 1/8 to 2. A token's score is the sum of both g, the lowest stay. A frame's
weight is w = 1 + p - 1 / T, where p is a softmax over frames of minus the mean g to the clip.

As the authors' code (github.com/xuyang-liu16/VidCom2@944a17d), where its frames keep K together.
Differs: K is met, by (rank + 1/2) / w, of which the K lowest stay: theirs rounds each frame's
number by itself; ties go to the lower index. Every frame keeps one, theirs too, where K is enough.

Options:
    temperature: of the softmax over frames; a higher one gives them more even shares

Shapes: B clips, T frames of n tokens, N = Tn, K kept, D features, C channels.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage, take
from .numerics import choosing, constant, exp, keep_highest, rounded, softmax, to_choice_dtype, unit

stage = Stage.PROJECTED
needs: dict[str, str | None] = {"grid": None}
reads_frames = True
SCALES = (0.125, 0.25, 0.5, 1.0, 2.0)


def prune(signals: Signals, K: int, *, temperature: float = 0.01) -> Reduction:
    """Keep K; in the one frame of a picture, those farthest from its mean."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature:g}; it must be above 0")
    T, B = signals.frames, len(signals.x_BND)
    with choosing():
        u_BTnC = unit(quiet_channels(signals.x_BND)).reshape(B, T, signals.x_BND.shape[1] // T, -1)
        to_clip_BTn = closeness(u_BTnC, u_BTnC.mean(axis=(1, 2), keepdims=True))
        to_frame_BTn = closeness(u_BTnC, u_BTnC.mean(axis=2, keepdims=True))
        score_BTn = rounded(to_clip_BTn + to_frame_BTn)
        if T == 1:
            return Reduction(keep_highest(-score_BTn[:, 0], K))
        weight_BT1 = frame_weights(to_clip_BTn.mean(axis=-1), temperature)[..., None]
        rank_BTn = to_choice_dtype(mx.argsort(mx.argsort(score_BTn, axis=-1), axis=-1))
        # Each frame's first comes before all others.
        turn_BTn = mx.where(rank_BTn == 0, -weight_BT1, (rank_BTn + 0.5) / weight_BT1)
        return Reduction(keep_highest(-turn_BTn.reshape(B, -1), K))


def quiet_channels(x_BND: mx.array) -> mx.array:
    """The half of the channels that varies least over the clip, (B, N, C)."""
    x_BND = to_choice_dtype(x_BND)
    variance_BD = mx.square(x_BND - x_BND.mean(axis=1, keepdims=True)).mean(axis=1)
    channel_BC = keep_highest(-rounded(variance_BD), max(1, x_BND.shape[-1] // 2))
    return take(x_BND, channel_BC, axis=2)


def closeness(u_BTnC: mx.array, centre: mx.array) -> mx.array:
    """The sum of Gaussians of the distances to a centre, (B, T, n)."""
    square_BTn = mx.square(u_BTnC - centre).sum(axis=-1)
    parts = [exp(-square_BTn / constant(2 * scale)) for scale in SCALES]
    return mx.stack(parts).sum(axis=0)


def frame_weights(closeness_BT: mx.array, temperature: float) -> mx.array:
    """How many tokens of the mean number a frame keeps, (B, T): more of one that is less close to
    the clip."""
    share_BT = softmax(-closeness_BT, temperature)
    return rounded(constant(1) + share_BT - constant(1 / closeness_BT.shape[-1]))
