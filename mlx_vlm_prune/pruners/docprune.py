"""Drop the patches of a document's background, before the tower's first layer.

DocPrune, arXiv:2604.22281, its first stage. The commonest grey of a picture is its background. A
patch has as much ink as the share of its pixels that are more than `tolerance` levels off; the K
with the most ink stay.

The paper drops every patch with little ink (on its pages 36 %), so that the picture decides how
many stay; here the budget does. Ahead of another method the share 0.64 stays.

A level is one of 255 of a picture's grey. What the tower is given is scaled and shifted, for each
channel; a level is then 0.0146 for CLIP's deviations, and 0.0078 for SigLIP's. The paper's
tolerance is 1, for clean pages. Ours is 16, by which a page with
grain has a background, too. On 36 drawn pages with noise of up to 6 levels 87 % of the patches were
background with a tolerance of 16, and 9 % with 1. The sixth of the patches with the most ink held
all print with 16, and 82 % of it with 1.

No code of the authors is public.

Options:
    share: how many stay where another method follows, above 0 and up to 1; keep= says it as a
        number
    level: a level of grey in preprocessed pixel values, above 0
    tolerance: how many levels a pixel of the background may be off, 0 or more

Shapes: B images, N patches of P pixels, K kept, M pixels of an image.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage
from .numerics import choosing, constant, keep_highest, rounded, to_choice_dtype

stage = Stage.ENCODER
needs: dict[str, str | None] = {"grey": None}
LEVEL = 0.0146  # 1 / 255 / 0.2686; CLIP's deviations are 0.2613 to 0.2758


def cuts(layers: int, N: int, K: int) -> list[tuple[int, str, int]]:
    """Once, before the first layer."""
    return [(0, "before", K)]


def leaves(N: int, K: int, *, share: float = 0.64) -> int:
    """A share of N, or K where that is more."""
    if not 0 < share <= 1:
        raise ValueError(f"share is {share:g}; it is above 0 and up to 1")
    return max(K, int(share * N))


def prune(signals: Signals, K: int, *, level: float = LEVEL, tolerance: int = 16) -> Reduction:
    """Keep the K with the most ink."""
    with choosing():
        ink_BN = ink(signals.grey_BNP, level, tolerance)
        return Reduction(keep_highest(ink_BN, K), score_BN=ink_BN)


def ink(grey_BNP: mx.array, level: float = LEVEL, tolerance: int = 16) -> mx.array:
    """The share of each patch's pixels that are not of the background, (B, N). Raises ValueError;
    called under `choosing()`."""
    if not level > 0 or tolerance < 0:
        raise ValueError("level is above 0, and tolerance 0 or more")
    level_BNP = mx.round(rounded(to_choice_dtype(grey_BNP)) / constant(level)).astype(mx.int32)
    background_B = commonest(level_BNP.reshape(len(level_BNP), -1))
    off_BNP = mx.abs(level_BNP - background_B[:, None, None]) > tolerance
    return to_choice_dtype(off_BNP).mean(axis=-1)


def commonest(level_BM: mx.array) -> mx.array:
    """The number that stands most often in each row, (B,); of equals the lowest."""
    level_BM = mx.sort(level_BM, axis=-1)
    place_M = mx.arange(level_BM.shape[1])
    begins_BM = mx.concatenate(
        [mx.ones_like(level_BM[:, :1]), level_BM[:, 1:] - level_BM[:, :-1]], axis=1
    )
    begin_BM = mx.cummax(mx.where(begins_BM != 0, place_M, 0), axis=1)
    end_B1 = mx.argmax(place_M - begin_BM, axis=1)[:, None]  # of the longest run
    return mx.take_along_axis(level_BM, end_B1, axis=1)[:, 0]
