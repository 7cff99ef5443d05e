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
from .numerics import choosing, cosine, rounded, to_choice_dtype

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
        norm_BN = np.array(rounded(mx.abs(to_choice_dtype(signals.keys_BND)).sum(axis=-1)))
        word_norm_BT = rounded(mx.abs(to_choice_dtype(signals.text_keys_BTD)).sum(axis=-1))
        norm_BT = np.array(mx.where(signals.text_real_BT, word_norm_BT, -1))
        similar_BNN = np.array(cosine(signals.normed_BND))
        similar_BTN = np.array(cosine(signals.text_BTD, signals.normed_BND))
    index = []
    for norm_N, norm_T, similar_NN, similar_TN in zip(
        norm_BN, norm_BT, similar_BNN, similar_BTN, strict=True
    ):
        tokens = np.argsort(-norm_N, kind="stable")[: min(pivots, K)]
        words = np.argsort(-norm_T, kind="stable")[: min(pivots, int((norm_T >= 0).sum()))]
        similar_PN = np.concatenate([similar_NN[tokens], similar_TN[words]])
        index.append(select_by_pivots(tokens, similar_PN, K))
    return Reduction(index_BK=mx.array(np.stack(index)))


def select_by_pivots(tokens: np.ndarray, similar_PN: np.ndarray, K: int) -> np.ndarray:
    """The tokens that are pivots, and for each pivot its share of the others, (K,) ascending."""
    P, rest = len(similar_PN), K - len(tokens)
    kept = list(tokens)
    for p, similar_N in enumerate(similar_PN):
        share = (p + 1) * rest // P - p * rest // P
        similar_N = np.where(np.isin(np.arange(len(similar_N)), kept), np.inf, similar_N)
        kept += list(np.argsort(similar_N, kind="stable")[:share])
    return np.sort(kept)
