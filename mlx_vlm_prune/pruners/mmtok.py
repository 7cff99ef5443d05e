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

Shapes: B images, N tokens, K kept, T words, n some of them, M = T + N rows to cover, D
features.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage
from .coverage import greedy_cover
from .numerics import choice_dtype, choosing, cosine, exp, rounded, softmax
from .rows import Rows, cosine_rows

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
        columns = cover_columns(signals.x_BND, words_BTN, image, soft)
        no_saliency_BN = mx.ones(signals.x_BND.shape[:2], dtype=choice_dtype())
        return Reduction(index_BK=greedy_cover(columns, no_saliency_BN, K))


def cover_columns(x_BND: mx.array, words_BTN: mx.array, image: float, soft: float) -> Rows:
    """How much of every word and of every token each token covers, (B, n, M) for n tokens."""
    similar, N = cosine_rows(x_BND), x_BND.shape[1]
    largest_BN, total_BN = (
        mx.concatenate(list(parts), axis=1)
        for parts in zip(*(softmax_parts(block, soft) for block in similar.blocks()), strict=True)
    )

    def columns_of(similar_BnN: mx.array, words_BnT: mx.array) -> mx.array:
        power_BnN = exp((similar_BnN - largest_BN[:, None]) / soft)
        tokens_BnN = power_BnN / total_BN[:, None] * image / N
        return rounded(mx.concatenate([words_BnT, tokens_BnN], axis=-1))

    return similar.then(columns_of, words_BTN.swapaxes(1, 2))


def softmax_parts(logits_BnN: mx.array, temperature: float) -> tuple[mx.array, mx.array]:
    """Of a softmax over the last axis, the largest logit and the sum of the powers, (B, n)."""
    largest_Bn = logits_BnN.max(axis=-1)
    return largest_Bn, exp((logits_BnN - largest_Bn[..., None]) / temperature).sum(axis=-1)
