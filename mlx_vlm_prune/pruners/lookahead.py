"""Let the first layers look more at the tokens that leave behind them, and keep the most diverse.

The other stages of Hi-Lo Prune, cvpr.thecvf.com/virtual/2026/poster/40023 (CVPR 2026): layers 0
and 1 (of 32) pay 1 + `boost` times as much attention to each token that is about to leave, ahead of
the softmax's sum, so that those that stay take in what it knows. Behind them stay the tokens
farthest from one another, by cosine distance of the rows as they enter, chosen as in `divprune`.

Behind `two_scales`, as `hilo`, it is the paper's method. The authors' code
(github.com/sealost/Hi-Lo_Prune) could not be read here, so this is not compared with it. From notes
on the paper: only attention above a threshold and among a row's highest is raised there, which
needs all attention of those layers, and ours is raised wherever it falls; how much the paper adds
is not known here, and `boost` is ours; what stays is chosen
there among all tokens, and here among those that enter, so that the first may be another.

Options:
    layer: layer from which on fewer tokens stay; below 1 a share of the depth
    boost: what is added to the attention that leaving tokens get, as a whole multiple of it,
        0 to 15

Shapes: B images, N tokens, K kept.
"""

from math import log

import mlx.core as mx

from .budget import one_cut
from .contract import Reduction, Signals, Stage
from .divprune import farthest
from .numerics import choosing, mask_of

stage = Stage.DECODER
needs: dict[str, str | None] = {"entrance": None}
MOST_BOOST = 15  # in mlx-vlm's models a row then stands 16 times in the first layers' caches


def schedule(layers: int, N: int, K: int, *, layer: float = 2 / 32) -> dict[int, int]:
    """One cut."""
    return one_cut(layers, N, K, layer)


def prune(signals: Signals, K: int) -> Reduction:
    """Keep the K farthest from one another as they entered."""
    with choosing():
        return Reduction(mx.sort(farthest(signals.entrance_BND, K), axis=-1))


def entry_bias(signals: Signals, K: int, *, boost: int = 1) -> mx.array:
    """What is added to the logits of the attention to each token until all but K leave, (B, N)."""
    if not 0 <= boost <= MOST_BOOST:
        raise ValueError(f"boost is {boost}; it is 0 to {MOST_BOOST}")
    index_BK = prune(signals, K).index_BK
    assert index_BK is not None
    stays_BN = mask_of(index_BK, signals.x_BND.shape[1])
    return mx.where(stays_BN, 0.0, log(1 + boost))
