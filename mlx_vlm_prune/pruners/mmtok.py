"""Keep the tokens that cover both the question and the image.

MMTok, Dong et al., ICLR 2026, arXiv:2508.18264. Every word, and every visual token, spreads
one unit of weight over the visual tokens: a softmax of its similarities to them, sharp
for words (temperature 0.01), softer within the image (0.2). The set of K tokens covers
a row to its largest entry; words and image are averaged, the image counts `image`
times, and the maximum coverage is found greedily.

Differs from the authors' code: similarities are cosines of projected tokens and of the
language model's embeddings of the prompt's words (theirs come from CLIP's two towers).

Options:
    image: weight of covering the image beside covering the words, 0 or more
    sharp: temperature of the words' softmax, above 0
    soft: temperature of the image's softmax, above 0

Shapes: B images, N tokens, K kept, T words, M = T + N rows to cover.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage
from .numerics import choice_dtype, choosing, cosine, rounded, softmax
from .scope import greedy_cover

stage = Stage.PROJECTED
needs: dict[str, str | None] = {"text": None}


def prune(
    signals: Signals, K: int, *, image: float = 0.5, sharp: float = 0.01, soft: float = 0.2
) -> Reduction:
    """Keep K."""
    if not (sharp > 0 and soft > 0 and image >= 0):
        raise ValueError("sharp and soft are temperatures above 0, and image is at least 0")
    with choosing():
        words_BTN = softmax(cosine(signals.text_BTD, signals.x_BND), sharp)
        real_BT1 = signals.text_real_BT[..., None]
        words_BTN = mx.where(real_BT1, words_BTN, 0) / real_BT1.sum(axis=1, keepdims=True)
        tokens_BNN = softmax(cosine(signals.x_BND), soft) * image / signals.x_BND.shape[1]
        rows_BMN = rounded(mx.concatenate([words_BTN, tokens_BNN], axis=1))
        no_saliency_BN = mx.ones(signals.x_BND.shape[:2], dtype=choice_dtype())
        return Reduction(index_BK=greedy_cover(rows_BMN, no_saliency_BN, K))
