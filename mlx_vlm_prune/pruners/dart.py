"""Keep a few pivots, and of the other tokens those least similar to them.

DART, Wen et al., EMNLP 2025, arXiv:2502.11494. At `layer` (2 of 32): the pivots are the 4
visual tokens and the 4 words after the image with the largest L1 norm of their keys. In turn each
pivot adds its share of the remaining budget: the tokens least similar to it, by the cosine of
the hidden states after the final norm. Positions are kept; no attention is needed.

As the authors' code (github.com/ZichenWen1/DART, read in its copy xqy1111111/DART@d6a5af6) where
its pivots happen to come in the same order. Differs: pivots come in the order of their norms,
images first, theirs in that of a Python set of their numbers; shares add up to K, theirs are
rounded down.

Options:
    layer: layer of the language model before which tokens leave; below 1 a share of the depth
    pivots: pivots among the visual tokens, and as many among the words; 1 or more

Shapes: B images, N tokens, K kept, T words, p tokens or words that are pivots, P both together, D
features.
"""

import mlx.core as mx

from .budget import one_cut
from .contract import Reduction, Signals, Stage, take
from .numerics import choosing, cosine, fused, keep_marked, mask_of, rounded, to_choice_dtype

stage = Stage.DECODER
needs: dict[str, str | None] = {"held_keys": None, "normed": None}


def schedule(layers: int, N: int, K: int, *, layer: float = 2 / 32) -> dict[int, int]:
    """One cut."""
    return one_cut(layers, N, K, layer)


def prune(signals: Signals, K: int, *, pivots: int = 4) -> Reduction:
    """Keep `pivots` tokens and the least similar to them and to as many words."""
    if pivots < 1:
        raise ValueError(f"pivots is {pivots}; it must be at least 1")
    with choosing():
        norm_BN = rounded(mx.abs(to_choice_dtype(signals.keys_BND)).sum(axis=-1))
        norm_BT = rounded(mx.abs(to_choice_dtype(signals.text_keys_BTD)).sum(axis=-1))
        norm_BT = mx.where(signals.text_real_BT, norm_BT, -1)
        token_Bp = mx.argsort(-norm_BN, axis=-1)[:, : min(pivots, K)]
        word_Bp = mx.argsort(-norm_BT, axis=-1)[:, :pivots]
        words_B1 = mx.minimum(signals.text_real_BT.sum(axis=-1, keepdims=True), pivots)
        pivot_BPD = mx.concatenate(
            [take(signals.normed_BND, token_Bp), take(signals.text_BTD, word_Bp)], axis=1
        )
        similar_BPN = cosine(pivot_BPD, signals.normed_BND)
        return Reduction(select_by_pivots(token_Bp, words_B1, similar_BPN, K))


def select_by_pivots(
    token_Bp: mx.array, words_B1: mx.array, similar_BPN: mx.array, K: int
) -> mx.array:
    """The tokens that are pivots, and for each pivot its share of the others, (B, K) ascending.

    `words_B1` says how many words are pivots: behind them padding has no share.
    """
    (P, N), tokens = similar_BPN.shape[1:], token_Bp.shape[1]
    rest, pivots_B1 = K - tokens, words_B1.astype(mx.int32) + tokens
    is_kept_BN, share_BP = mask_of(token_Bp, N), shares(mx.arange(P), pivots_B1, mx.array(rest))
    for p in range(P):
        similar_BN = mx.where(is_kept_BN, mx.inf, similar_BPN[:, p])
        rank_BN = mx.argsort(mx.argsort(similar_BN, axis=-1), axis=-1)
        is_kept_BN = is_kept_BN | (rank_BN < share_BP[:, p : p + 1])
    return keep_marked(is_kept_BN, K)


@fused
def shares(number_P: mx.array, pivots_B1: mx.array, rest: mx.array) -> mx.array:
    """How many of the rest each pivot adds, (B, P); those behind the last add none."""
    share_BP = (number_P + 1) * rest // pivots_B1 - number_P * rest // pivots_B1
    return mx.where(number_P < pivots_B1, share_BP, 0).astype(mx.uint32)
