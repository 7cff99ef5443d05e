"""Keep the tokens that others attend to most, in three layers of the tower; recycle the rest.

The encoder part of iLLaVA, ICLR 2026, arXiv:2412.06263; `illava` is the chain with its decoder
part. Inside the layers 5, 9 and 13 of 32, between attention and MLP, as many tokens leave each
time. Those stay to which all others attend most there. The last 5 % of them take in what leaves:
each becomes the mean of itself and of a mixture of the five leaving tokens with which its product
is largest, by a softmax of those products over the root of their size.

In a chain it takes 40 % of all that shall leave, as in the paper.

As the authors' code (github.com/hulianyuyy/iLLaVA@d4e221b), for Qwen3-VL. Differs: single patches
stay, where theirs are in groups of 2 x 2; the attention that a token gets is the mean over all
queries, as in their first code, where this one takes what flash attention returns in its place, the
log of each query's own sum.

Options:
    start: the first layer of the tower inside which tokens leave; below 1 a share of the depth
    end: the last one
    stages: in how many layers, evenly between them, 1 to 100
    share: of what leaves in a chain, how much leaves here, 0 to 1
    recycled: share of the kept that take in what leaves, 0 to 1, at least one token

Shapes: B images, N tokens, K kept, C of them that take others in, R that leave, M of those for
each, D features.
"""

import mlx.core as mx

from .budget import check_stages
from .contract import Reduction, Signals, Stage, take
from .numerics import choosing, rounded, softmax, to_choice_dtype
from .pipeline import layer_at

stage = Stage.ENCODER
needs: dict[str, str | None] = {"layer_attention": None}
TAKEN_IN = 5  # tokens that one takes in


def cuts(
    layers: int, N: int, K: int, *, start: float = 5 / 32, end: float = 13 / 32, stages: int = 3
) -> list[tuple[int, str, int]]:
    """Between attention and MLP; where two fall on one layer the later one holds."""
    check_stages(stages)
    first, last = layer_at(start, layers), layer_at(end, layers)
    if first > last:
        raise ValueError(f"start is layer {first}, and end layer {last}; give an end behind it")
    left = {}
    for i in range(1, stages + 1):
        layer = first + (last - first) * (i - 1) // max(stages - 1, 1)
        left[layer] = N - (N - K) * i // stages
    return [(layer, "middle", n) for layer, n in left.items()]


def leaves(N: int, K: int, *, share: float = 0.4) -> int:
    """A share of the N - K stays away from here on."""
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share:g}; it is 0 to 1")
    return N - int(share * (N - K))


def prune(signals: Signals, K: int, *, recycled: float = 0.05) -> Reduction:
    """Keep the K most attended, of which the last take in what leaves."""
    return keep_and_recycle(signals.x_BND, signals.layer_attention_BN, K, recycled)


def keep_and_recycle(x_BND: mx.array, score_BN: mx.array, K: int, recycled: float) -> Reduction:
    """The K of the highest score, of which the last take in others. Raises ValueError."""
    if not 0 <= recycled <= 1:
        raise ValueError(f"recycled is {recycled:g}; it is a share from 0 to 1")
    C = min(K, max(1, round(K * recycled)))
    with choosing():
        score_BN = rounded(to_choice_dtype(score_BN))
        order_BN = mx.argsort(-score_BN, axis=-1)
        centre_BC, leaving_BR = order_BN[:, K - C : K], order_BN[:, K:]
        mixed_BCD = take_in(take(x_BND, centre_BC), take(x_BND, leaving_BR))
        place_BCD = mx.broadcast_to(centre_BC[..., None], mixed_BCD.shape)
        value_BND = mx.put_along_axis(x_BND, place_BCD, mixed_BCD.astype(x_BND.dtype), axis=1)
        index_BK = mx.sort(order_BN[:, :K], axis=-1)
        return Reduction(index_BK, value_BND=value_BND, score_BN=score_BN)


def take_in(x_BCD: mx.array, leaving_BRD: mx.array) -> mx.array:
    """Each of x as the mean of itself and of a mixture of those leaving that are likest it."""
    x_BCD, leaving_BRD = to_choice_dtype(x_BCD), to_choice_dtype(leaving_BRD)
    (B, C, D), M = x_BCD.shape, min(TAKEN_IN, leaving_BRD.shape[1])
    product_BCR = rounded(x_BCD @ leaving_BRD.swapaxes(1, 2))
    likest_BCM = mx.argsort(-product_BCR, axis=-1)[..., :M]
    share_BCM = softmax(mx.take_along_axis(product_BCR, likest_BCM, axis=-1) / D**0.5)
    taken_BCMD = take(leaving_BRD, likest_BCM.reshape(B, C * M)).reshape(B, C, M, D)
    return (x_BCD + (share_BCM[..., None] * taken_BCMD).sum(axis=2)) / 2
