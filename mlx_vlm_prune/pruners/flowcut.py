"""Drop, at every second layer of the tower, what little of the CLS token's attention flows to.

FlowCut, Tong et al., NeurIPS 2025, arXiv:2505.19536. A token's score in a layer is (its share of
CLS's attention + its share of a softmax over the products of CLS's value with all values) times
the L1 norm of its value; values are means over heads, both shares of patches alone. From layer to
layer the mean of the new score and of the one so far is kept. Counted back from the last layer but
one, which leaves K, tokens leave in every second: (n - K) / sqrt(l) * (1 - (H / log n)^2) of n,
where l layers are left till then and H is the entropy of CLS's attention; the lowest scores go.

How many leave is read on the host at each of those layers; images of a batch go through the tower
one by one. Forecasts take `ASSUMED` in place of the entropies.

As the authors' code (github.com/TungChintao/FlowCut@a2ecd24), its tower for LLaVA-1.5. Differs:
tokens leave between attention and MLP, theirs behind the MLP, which changes nothing in those that
stay; each image has an entropy of its own, theirs the lowest of a batch; attention of 0 adds no
entropy, theirs is not a number then; where a tower has no CLS the mean patch stands in for it, as
everywhere here; theirs for LLaVA-NeXT and Qwen2-VL, which leave half of the choice to the language
model, is not here.

Options:
    entropy: what is taken for H / log n in all layers and images, up to 1; 0 measures it. One that
        is given needs no return to the host, and images go through the tower together

Shapes: B images, N tokens, K kept, n tokens at present, H heads, d head size.
"""

import mlx.core as mx
import numpy as np

from .contract import Reduction, Signals, Stage
from .numerics import choosing, keep_highest, on_host, rounded, softmax, to_choice_dtype

stage = Stage.ENCODER
needs: dict[str, str | None] = {"cls_row": None, "values": None, "cls_value": None}
ASSUMED = 0.9  # of the largest entropy


def cuts(layers: int, N: int, K: int, *, entropy: float = 0.0) -> list[tuple[int, str, int]]:
    """All layers up to the last but one, since scores add up; with the tokens left behind each."""
    if not 0 <= entropy <= 1:
        raise ValueError(f"entropy is {entropy:g}; it is a share of the largest, 0 to 1")
    plan, n = list[tuple[int, str, int]](), N
    for remaining in reversed(range(max(1, layers - 1))):
        n = left_of(n, K, remaining, entropy or ASSUMED)
        plan.append((len(plan), "middle", n))
    return plan


def adapts(*, entropy: float = 0.0) -> bool:
    """Does an image decide how many of its tokens leave at a cut?"""
    return not entropy


def left(signals: Signals, K: int, remaining: int) -> int:
    """How many tokens of one image stay at a cut, with so many layers till the last one."""
    n = signals.x_BND.shape[1]
    if remaining % 2 or not remaining:
        return left_of(n, K, remaining, 0)
    (attention_1n,) = on_host(signals.cls_row_BN)
    return left_of(n, K, remaining, entropy_of(attention_1n[0]))


def entropy_of(attention_n: np.ndarray) -> float:
    """The entropy of attention as a share of the largest that n tokens can have."""
    share_n = attention_n / attention_n.sum()
    entropy: float = -(share_n * np.log(np.where(share_n > 0, share_n, 1))).sum()
    return entropy / np.log(len(share_n))


def left_of(n: int, K: int, remaining: int, entropy: float) -> int:
    """How many of n tokens stay; entropy is a share of the largest."""
    if remaining % 2:
        return n
    if not remaining:
        return K
    leaving = (n - K) / remaining**0.5 * (1 - entropy**2)
    return n - min(round(round(leaving, 9)), n - K)


def accumulate(signals: Signals) -> mx.array:
    """The scores of a layer, and half of each with half of those of the layers before, (B, N)."""
    with choosing():
        score_BN, before_BN = layer_scores(signals), signals.get("accumulated_BN")
        return score_BN if before_BN is None else (before_BN + score_BN) / 2


def layer_scores(signals: Signals) -> mx.array:
    """Attention and likeness of values to CLS's, times the length of a token's value."""
    values_BHNd = to_choice_dtype(signals.values_BNHd.swapaxes(1, 2))
    cls_BHd1 = to_choice_dtype(signals.cls_value_BHd)[..., None]
    logits_BHS = (values_BHNd @ cls_BHd1)[..., 0]
    if signals.has_cls:
        itself_BH1 = (cls_BHd1.swapaxes(2, 3) @ cls_BHd1)[..., 0]
        logits_BHS = mx.concatenate([itself_BH1, logits_BHS], axis=-1)
    alike_BN = softmax(logits_BHS).mean(axis=1)[:, int(signals.has_cls) :]
    attention_BN = to_choice_dtype(signals.cls_row_BN)
    length_BN = mx.abs(values_BHNd.mean(axis=1)).sum(axis=-1)
    return (share(attention_BN) + share(alike_BN)) * length_BN


def share(part_BN: mx.array) -> mx.array:
    """Each token's part of the sum; 0 where that is 0."""
    return part_BN / mx.maximum(part_BN.sum(axis=-1, keepdims=True), 1e-30)


def prune(signals: Signals, K: int) -> Reduction:
    """Keep the K highest of the scores so far."""
    with choosing():
        score_BN = signals.get("accumulated_BN")
        score_BN = accumulate(signals) if score_BN is None else score_BN
        score_BN = rounded(score_BN)
        return Reduction(keep_highest(score_BN, K), score_BN=score_BN)
