"""Keep a few pivots, and of the other tokens those least similar to them.

DART, Wen et al., EMNLP 2025, arXiv:2502.11494. At `layer` (2 of 32): the pivots are the 4
visual tokens and the 4 words with the largest L1 norm of their keys. In turn each pivot
adds its share of the remaining budget: the tokens least similar to it, by the cosine of
the hidden states after the final norm. Positions are kept; no attention is needed.

Differs from the authors' code: pivots come in the order of their norms, images first, and
never in that of a Python set, which made its results change; the shares add up to K.

Options:
    layer: layer of the language model before which tokens leave; below 1 a share of the depth
    pivots: pivots among the visual tokens, and as many among the words; 1 or more

Shapes: I images, N tokens, K kept, T words, P pivots, D features.
"""

import mlx.core as mx
import numpy as np

from .budget import one_cut
from .contract import Reduction, Signals, Stage
from .numerics import cosine, rounded, to_float64

stage = Stage.DECODER
needs: dict[str, str | None] = {"held_keys": None, "normed": None}


def schedule(layers: int, N: int, K: int, *, layer: float = 2 / 32) -> dict[int, int]:
    """One cut."""
    return one_cut(layers, N, K, layer)


def prune(signals: Signals, K: int, *, pivots: int = 4) -> Reduction:
    """Keep `pivots` tokens and the least similar to them and to as many words."""
    if pivots < 1:
        raise ValueError(f"pivots is {pivots}; it must be at least 1")
    with mx.stream(mx.cpu):
        token_BN = np.array(rounded(mx.abs(to_float64(signals.keys_BND)).sum(axis=-1)))
        length_BT = rounded(mx.abs(to_float64(signals.text_keys_BTD)).sum(axis=-1))
        word_BT = np.array(mx.where(signals.text_real_BT, length_BT, -1))
        to_token_BNN = np.array(cosine(signals.normed_BND))
        to_word_BTN = np.array(cosine(signals.text_BTD, signals.normed_BND))
    index = []
    for token_N, word_T, to_token_NN, to_word_TN in zip(
        token_BN, word_BT, to_token_BNN, to_word_BTN, strict=True
    ):
        first = np.argsort(-token_N, kind="stable")[: min(pivots, K)]
        words = np.argsort(-word_T, kind="stable")[: min(pivots, int((word_T >= 0).sum()))]
        similar_PN = np.concatenate([to_token_NN[first], to_word_TN[words]])
        index.append(select_by_pivots(first, similar_PN, K))
    return Reduction(index_BK=mx.array(np.stack(index)))


def select_by_pivots(first: np.ndarray, similar_PN: np.ndarray, K: int) -> np.ndarray:
    """The pivots among the tokens, and each pivot's share of what is left, ascending."""
    P, rest = len(similar_PN), K - len(first)
    kept = list(first)
    for p, similar_N in enumerate(similar_PN):
        share = (p + 1) * rest // P - p * rest // P
        unlike = np.where(np.isin(np.arange(len(similar_N)), kept), np.inf, similar_N)
        kept += list(np.argsort(unlike, kind="stable")[:share])
    return np.sort(kept)
