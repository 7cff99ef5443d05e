"""Keep the tokens farthest from one another, and the patches of which that is true as pixels.

The first stage of Hi-Lo Prune, cvpr.thecvf.com/virtual/2026/poster/40023 (CVPR 2026). Greedily, as
in `divprune`, the token farthest from all kept ones is kept: first by cosine distance of what the
projector gives, for `fine` of K, then by that of raw pixels. A patch that both choose counts once,
so the second choice goes on until K are kept.

Behind it `lookahead` lets go of what pixels chose, as `hilo`. The authors' code
(github.com/sealost/Hi-Lo_Prune) could not be read here, so this is not compared with it. From notes
on the paper: pixels choose a number there that is given, of which those that tokens chose too are
not made up for; ours follows K.

Options:
    fine: share of K that tokens choose, above 0 to 1

Shapes: B images, N tokens, K kept, k by tokens, D features.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage
from .divprune import farthest
from .numerics import choosing, keep_marked, mask_of

stage = Stage.PROJECTED
needs: dict[str, str | None] = {"pixels": None}


def prune(signals: Signals, K: int, *, fine: float = 0.67) -> Reduction:
    """Keep K."""
    if not 0 < fine <= 1:
        raise ValueError(f"fine is {fine:g}; it is a share of K above 0, at most 1")
    k, N = max(1, int(K * fine + 0.5)), signals.x_BND.shape[1]
    with choosing():
        is_kept_BN = mask_of(farthest(signals.x_BND, k), N)
        if k == K:
            return Reduction(keep_marked(is_kept_BN, K))
        chosen_BK = farthest(signals.pixels_BND, K)  # of which at most k are kept already
        token_BN = mx.zeros(is_kept_BN.shape, mx.int32)
        age_BK = mx.broadcast_to(K - mx.arange(K, dtype=mx.int32), chosen_BK.shape)
        order_BN = mx.put_along_axis(token_BN, chosen_BK, age_BK, axis=1)  # the first is highest
        order_BN = mx.where(is_kept_BN, K + 1, order_BN)
        return Reduction(mx.sort(mx.argsort(-order_BN, axis=-1)[:, :K], axis=-1))
