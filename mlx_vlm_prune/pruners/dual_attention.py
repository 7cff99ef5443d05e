"""Keep the tokens that all words together, or one word alone, attend to, and the tower's key ones.

The second stage of MustDrop, Liu et al., arXiv:2411.10803. Layers 2, 6, 10 and 14 (of 32, counted
from 0) run in full; then a token leaves whose share of the attention that all words after the image
paid to the image there is below one threshold, and the most that one word paid to it below
another. The budget sets both, in a given relation: what is kept is what the highest thresholds
that leave K keep. The tokens with the most CLS attention in the tower, 8 % of those that enter the
language model, never leave. Positions are renumbered.

Behind `window_merge`, as `mustdrop`, it is the paper's method but for its third stage: when the
prompt is read, MustDrop takes out of the caches of layers 2 to 14 what left later on, too. Here an
answer's tokens attend to what the prompt's did, so that an answer does not depend on whether it is
read from a cache; those caches are larger by what they hold of tokens that left later.

As the authors' code (github.com/liuting20/MustDrop@909afa5), `dual_attention_filter` and its key
set. Differs: K decides the thresholds, the same share staying at each layer, theirs are given,
0.001 and 0.001 for 192 of LLaVA's tokens; of key tokens beyond K those with the least CLS attention
leave; the caches keep what left later on, as said above; any batch.

Options:
    key: share of the tokens that enter the language model that never leave, 0 to 1
    relation: threshold of the share of all words over that of one word, above 0
    layer: number of the tower's layer whose CLS attention is read; -1 is the last
    behind: read the layer behind that one

Shapes: B images, n tokens at present, K kept, T words.
"""

import mlx.core as mx

from .budget import several_cuts
from .contract import Reduction, Signals, Stage
from .numerics import choosing, keep_highest, rounded, to_choice_dtype

stage = Stage.DECODER
needs: dict[str, str | None] = {"text_attention": None, "cls_rank": "layer"}
positions = "renumber"
CUTS = (3 / 32, 7 / 32, 11 / 32, 15 / 32)
KEY = 2.0  # less a rank: above any score


def schedule(layers: int, N: int, K: int) -> dict[int, int]:
    """The same share stays at each layer."""

    def counts(t: float) -> list[int]:
        return [max(1, int(N * t**i)) for i in range(1, len(CUTS) + 1)]

    return several_cuts(layers, N, K, CUTS, counts)


def prune(
    signals: Signals, K: int, *, key: float = 0.08, relation: float = 1.0,
    layer: float = -1, behind: bool = True,
) -> Reduction:  # fmt: skip
    """Keep the key tokens, and the highest scores; `layer` and `behind` are read by the host."""
    if not 0 <= key <= 1 or relation <= 0:
        raise ValueError("key is a share from 0 to 1, and relation above 0")
    with choosing():
        score_BN, rank_BN = scores(signals, relation), signals.cls_rank_BN
        kept_BN = mx.where(rank_BN < key, KEY - to_choice_dtype(rank_BN), score_BN)
        return Reduction(keep_highest(kept_BN, K), score_BN=kept_BN)


def scores(signals: Signals, relation: float) -> mx.array:
    """The highest threshold of one word's attention at which a token stays, at most 1, (B, n)."""
    real_BT1 = signals.text_real_BT[..., None]
    attention_BTn = to_choice_dtype(signals.text_attention_BTN) * real_BT1
    sum_Bn = attention_BTn.sum(axis=1)
    share_Bn = sum_Bn / mx.maximum(sum_Bn.sum(axis=-1, keepdims=True), 1e-30)
    return rounded(mx.minimum(mx.maximum(share_Bn / relation, attention_BTn.max(axis=1)), 1))
