"""Let few tokens go on between the tower's layers, and bring all back at its end.

IPCV, arXiv:2512.18747. Before `layer` (3 of 32) those tokens stay whose hidden state the layer
before has changed most. The whole image is back at the tower's end, so any method may follow, and
it is that one which keeps the budget: each token that left is as it was, plus the mean change since
of the kept tokens that were nearest to it then (Euclidean distance). In the same way tokens that
left are approximated for the attention of those that stayed, in the layers from `layer` to `until`
(10 of 32), and in a layer whose attention a later method reads.

Alone, or last in a chain, the method keeps the budget itself: what leaves stays away.

`least` is ours: in a tower whose first layers change the background most, as the built-in model's
do, objects are what has changed least. There the paper's choice answers no question, and this one
is the best method of the tower (docs/log.md).

As the authors' code (github.com/Perkzi/IPCV@29726f0), for Qwen2-VL. Differs: in the layers that
attend to tokens that left, theirs also computes what these tokens read, and drops it, ours does not
compute it; a token takes over changes of its own tile's patches alone, where theirs for InternVL
has CLS and the tokens of other tiles among the neighbours.

Options:
    layer: layer of the tower before which tokens leave; below 1 a share of the depth
    share: how many go on between the layers where another method follows, above 0 and up to 1;
        keep= says it as a number
    neighbours: kept tokens whose mean change a token takes over, 1 or more
    least: keep those tokens that the layer before has changed least
    until: the first layer that attends to kept tokens alone; below 1 a share of the depth

Shapes: B images, N tokens, n of them, K kept, D features, M neighbours.
"""

from collections.abc import Callable

import mlx.core as mx

from .contract import Reduction, Signals, Stage, take
from .numerics import choosing, keep_highest, rounded, to_choice_dtype
from .pipeline import layer_at
from .rows import block_size

stage = Stage.ENCODER
needs: dict[str, str | None] = {"before": "layer"}


def cuts(layers: int, N: int, K: int, *, layer: float = 3 / 32) -> list[tuple[int, str, int]]:
    """Once, before `layer`."""
    return [(layer_at(layer, layers), "before", K)]


def leaves(N: int, K: int, *, share: float = 0.35) -> int:
    """A share of N between the layers, whatever K."""
    if not 0 < share <= 1:
        raise ValueError(f"share is {share:g}; it is above 0 and up to 1")
    return max(1, int(share * N))


def attends_to_all(layers: int, *, layer: float = 3 / 32, until: float = 10 / 32) -> range:
    """From `layer` to `until`."""
    return range(layer_at(layer, layers), layer_at(until, layers))


def prune(signals: Signals, K: int, *, least: bool = False) -> Reduction:
    """Keep the K that changed most, or least."""
    with choosing():
        change_BND = to_choice_dtype(signals.x_BND) - to_choice_dtype(signals.before_BND)
        square_BN = rounded(mx.square(change_BND).sum(axis=-1))
        score_BN = -square_BN if least else square_BN
        return Reduction(keep_highest(score_BN, K), score_BN=score_BN)


def give_back(
    signals: Signals, kept: Reduction, *, neighbours: int = 10
) -> Callable[[mx.array], mx.array]:
    """A function from the kept tokens as they are later, (B, K, D), to all, (B, N, D)."""
    if neighbours < 1:
        raise ValueError(f"neighbours is {neighbours}; it is 1 or more")
    assert kept.index_BK is not None
    nearest_BNM = nearest_kept(signals.x_BND, kept.index_BK, min(neighbours, kept.slots))
    then_BND, then_BKD = signals.x_BND, kept.tokens(signals.x_BND)
    slot_BN, _ = kept.members(then_BND.shape[1])
    stayed_BN1, slot_BN = (slot_BN >= 0)[..., None], mx.maximum(slot_BN, 0)

    def all_tokens(now_BKD: mx.array) -> mx.array:
        change_BKD, M = now_BKD - then_BKD, nearest_BNM.shape[2]
        change_BND = sum(take(change_BKD, nearest_BNM[..., m]) for m in range(M)) / M
        return mx.where(stayed_BN1, take(now_BKD, slot_BN), then_BND + change_BND)

    return all_tokens


def nearest_kept(x_BND: mx.array, index_BK: mx.array, M: int) -> mx.array:
    """The slots of the M kept tokens that are nearest to each token, (B, N, M); of equals the
    first."""
    with choosing():
        x_BND, N = to_choice_dtype(x_BND), x_BND.shape[1]
        kept_BKD = take(x_BND, index_BK)
        square_B1K, size = mx.square(kept_BKD).sum(axis=-1)[:, None], block_size(N)
        parts = []
        for first in range(0, N, size):  # a token's own square is the same for all it may be near
            product_BnK = x_BND[:, first : first + size] @ kept_BKD.swapaxes(1, 2)
            distance_BnK = rounded(square_B1K - 2 * product_BnK)
            parts.append(mx.argsort(distance_BnK, axis=-1)[..., :M])
        return mx.concatenate(parts, axis=1)
