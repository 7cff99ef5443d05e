"""What methods choose by: the K highest scores, similarities, means.

Choices are made in float64. In float32 the order in which a sum is taken decides which of two
near-duplicates wins, so that two machines keep different tokens. Only a CPU has float64: all
functions but `keep_highest` and `mask_of`, and what uses their results, are called under
`mx.stream(mx.cpu)`.

Shapes: B images, N tokens, M others, D features, K kept.
"""

import mlx.core as mx

E = 2.718281828459045  # `mx.exp` computes in float32 even in float64; `mx.power` does not


def keep_highest(score_BN: mx.array, K: int) -> mx.array:
    """Indices (B, K), ascending, of the K highest scores; ties go to the lower index."""
    if score_BN.dtype != mx.float64:
        score_BN = score_BN.astype(mx.float32)
    order_BK = mx.argsort(-score_BN, axis=-1)[:, :K]  # stable
    return mx.sort(order_BK, axis=-1) if K else order_BK


def to_float64(x: mx.array) -> mx.array:
    """As float64."""
    return x.astype(mx.float64)


def unit(x_BND: mx.array) -> mx.array:
    """Tokens scaled to length one, float64; a zero token stays zero."""
    x_BND = to_float64(x_BND)
    norm_BN1 = mx.sqrt(mx.square(x_BND).sum(axis=-1, keepdims=True))
    return x_BND / mx.maximum(norm_BN1, mx.array(1e-6, mx.float64))


def cosine(x_BND: mx.array, y_BMD: mx.array | None = None) -> mx.array:
    """Cosine similarity of every two tokens, (B, N, M), float64.

    Rounded to twelve digits, so that equal tokens tie in whatever order a product is summed.
    """
    x_BND = unit(x_BND)
    y_BMD = x_BND if y_BMD is None else unit(y_BMD)
    return rounded(x_BND @ y_BMD.swapaxes(1, 2))


def rounded(x: mx.array) -> mx.array:
    """Rounded to twelve digits after the point, float64. (`mx.round` itself scales in float32.)"""
    ten_12 = mx.array(1e12, mx.float64)
    return mx.round(to_float64(x) * ten_12) / ten_12


def softmax(logits: mx.array, temperature: float = 1.0) -> mx.array:
    """Softmax over the last axis, float64."""
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    power = mx.power(mx.array(E, mx.float64), logits)
    return power / power.sum(axis=-1, keepdims=True)


def scale_to_unit(score_BN: mx.array) -> mx.array:
    """Scores from 0 (an image's lowest) to 1 (its highest), float64; 0 where all are equal."""
    score_BN = to_float64(score_BN)
    low_B1, high_B1 = score_BN.min(-1, keepdims=True), score_BN.max(-1, keepdims=True)
    return (score_BN - low_B1) / mx.maximum(high_B1 - low_B1, mx.array(1e-12, mx.float64))


def mask_of(index_BK: mx.array, N: int) -> mx.array:
    """Which of N tokens are in an index, (B, N)."""
    return (index_BK[..., None] == mx.arange(N)).any(axis=1)


def nearest_mean(similar_BNK: mx.array, index_BK: mx.array) -> mx.array:
    """Weights (B, K, N) by which each kept token becomes the mean of itself and of the dropped
    tokens most similar to it."""
    member_BKN = membership(similar_BNK, index_BK)
    return member_BKN / member_BKN.sum(axis=-1, keepdims=True)


def membership(similar_BNK: mx.array, index_BK: mx.array) -> mx.array:
    """Which tokens each kept one stands for, (B, K, N): itself and the dropped ones most similar to
    it. Of equally similar kept tokens the first."""
    N, K = similar_BNK.shape[1:]
    home_BN = mx.argmax(similar_BNK, axis=-1)
    anchor_BKN = index_BK[..., None] == mx.arange(N)
    is_kept_B1N = anchor_BKN.any(axis=1, keepdims=True)
    return anchor_BKN | ((home_BN[:, None] == mx.arange(K)[:, None]) & ~is_kept_B1N)
