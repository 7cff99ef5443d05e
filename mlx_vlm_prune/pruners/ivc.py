"""Add tokens whose positions are the coordinates by which the language model finds places.

IVC-Prune, Sun et al., ICLR 2026, arXiv:2602.03060: an enhancer for any selector that merges none.
Rotary embeddings turn the token at position m by m times each frequency. Where the turns are near
none (the mean of their cosines is high) or near a quarter (the mean of their sines is), a model
finds the axes of the picture: these are its anchors. They depend on positions alone, those of the
whole prompt; of a model that counts along three axes the means are of all three.

A selector chooses the share of K that is left, and the best anchors among the tokens that it did
not choose join it: those with the highest cosine and the highest sine, then those next to them, and
so on. In the paper a tenth of the tokens are anchors by cosines, as many by sines, and a half of
all stay: two fifths. The paper's own selector is in `ivc_prune`.

Anchors are ranked as in `ivc_prune`, which is compared with the authors' code; there those that
two rules name make the set smaller, here the next best fill it. Where layers rotate by several
embeddings (Gemma 3's) it is the one of the layer that reads the tokens, ahead of the language
model of its first.

Options:
    anchors: share of K that are anchors, 0 to 1, rounded; the selector keeps one at least

Shapes: B images, N tokens, K kept.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage
from .numerics import choosing, keep_highest, mask_of, rounded

stage = Stage.ENHANCER
needs: dict[str, str | None] = {"rotation": None}
DIGITS = 6  # of a mean of cosines, which are computed in float32


def selected(K: int, *, anchors: float = 0.4) -> int:
    """How many of K tokens the selector chooses."""
    if not 0 <= anchors <= 1:
        raise ValueError(f"anchors is {anchors:g}; it is a share of K from 0 to 1")
    return max(1, K - round(K * anchors))


def complete(signals: Signals, kept: Reduction, K: int) -> Reduction:
    """The tokens that a selector chose, and the best anchors among the others: K in all."""
    if kept.merges or kept.index_BK is None:
        raise ValueError("anchors join a selector that merges no tokens")
    with choosing():
        rank_BN = anchor_ranks(signals)
        rank_BN = mx.where(mask_of(kept.index_BK, rank_BN.shape[1]), -1, rank_BN)
        return Reduction(keep_highest(-rank_BN, K), score_BN=kept.score_BN)


def anchor_ranks(signals: Signals) -> mx.array:
    """Each token's place, from 0, in the order of its cosine or in that of its sine, whichever is
    the better one, (B, N)."""
    by_cosine_BN, by_sine_BN = (
        mx.argsort(mx.argsort(-rounded(mean_BN, DIGITS), axis=-1), axis=-1).astype(mx.int32)
        for mean_BN in (signals.rotary_cosine_BN, signals.rotary_sine_BN)
    )
    return mx.minimum(by_cosine_BN, by_sine_BN)
