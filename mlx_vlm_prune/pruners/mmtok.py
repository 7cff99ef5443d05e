"""Keep the tokens that cover both the question and the image.

MMTok, Dong et al., ICLR 2026, arXiv:2508.18264. Every word, and every visual token, spreads
one unit of weight over the visual tokens: a softmax of its similarities to them, sharp
for words (temperature 0.02), softer within the image (0.2). The set of K tokens covers
a row to its largest entry; words and image are averaged, the image counts `image`
times, and the maximum coverage is found greedily.

As the authors' code (github.com/Ironieser/MMTok@d1522cd): words are the language model's
embeddings, beside projected tokens; tokens are compared with one another as the tower's features;
in Qwen2.5-VL the default for `sharp` is 0.01. Differs: every word of the prompt counts, not the
question's alone, since no part of a prompt is marked as the question here; all is computed in
float64 on a CPU, so that near ties fall the same way in both versions here.

Options:
    image: weight of covering the image beside covering the words, 0 or more
    sharp: temperature of the words' softmax, above 0
    soft: temperature of the image's softmax, above 0

Shapes: B images, N tokens, K kept, T words, n some of them, M = T + N rows to cover, D
features.
"""

from functools import partial

import mlx.core as mx

from .contract import Reduction, Signals, Stage
from .coverage import greedy_cover
from .lazy import HeldRows, read_lazily
from .numerics import choice_dtype, choosing, cosine, exp, rounded, softmax
from .rows import Rows, cosine_rows

stage = Stage.PROJECTED
needs: dict[str, str | None] = {"text": None, "features": None}
LEAST_POWER = 1e-30  # so that a zero token, which is like none, has a softmax


def prune(
    signals: Signals, K: int, *, image: float = 0.5, sharp: float = 0.02, soft: float = 0.2
) -> Reduction:
    """Keep K."""
    if not (sharp > 0 and soft > 0 and image >= 0):
        raise ValueError("sharp and soft are temperatures above 0, and image is at least 0")
    with choosing():
        N, real_BT1 = signals.x_BND.shape[1], signals.text_real_BT[..., None]
        words_BTN = softmax(cosine(signals.text_BTD, signals.x_BND), sharp) * N**2
        words_BTN = mx.where(real_BT1, words_BTN, 0) / real_BT1.sum(axis=1, keepdims=True)
        no_saliency_BN = mx.ones(signals.x_BND.shape[:2], dtype=choice_dtype())
        columns_of = partial(cover_columns, image=image, soft=soft)
        index_BK = greedy_cover(columns_of, no_saliency_BN, K, signals.features_BND, words_BTN)
        return Reduction(index_BK=index_BK)


def cover_columns(
    x_BND: mx.array, words_BTN: mx.array, image: float, soft: float
) -> Rows | HeldRows:
    """How much of every word and of every token each token covers, (B, n, M) for n tokens.

    All times N squared: what is rounded is then about as large as a cosine."""
    B, T, N = words_BTN.shape

    def powers_of(similar_BnN: mx.array, words_BnT: mx.array) -> mx.array:
        power_BnN = mx.maximum(exp((similar_BnN - 1) / soft), LEAST_POWER)
        return mx.concatenate([words_BnT, power_BnN], axis=-1)

    similar = cosine_rows(x_BND, hold=choice_dtype() == mx.float32)
    powers = read_lazily(similar.then(powers_of, words_BTN.swapaxes(1, 2)))
    total_BN = powers.summed_up(lambda row_BnM: row_BnM[..., T:].sum(axis=-1))
    one_BT = mx.ones((B, T), dtype=choice_dtype())
    share_BM = mx.concatenate([one_BT, 1 / total_BN * image * N], axis=1)
    return powers.then(lambda row_BnM: rounded(row_BnM * share_BM[:, None]))
