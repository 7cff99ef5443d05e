"""A budget for each image, by how unlike its tokens are: the option `budget=similarity`.

PruneSID, Fang et al., ICLR 2026, arXiv:2603.09480, section 3.4: what an image has to say is
1 - rho, with rho the mean cosine similarity of two of its tokens, and it keeps tokens in proportion
to that. Its authors' public code (github.com/ZhengyaoFang/PruneSID) has no such budgets, and the
paper says no factor.

Here it is to a `reference` that is said, so that an image keeps the same alone, in a batch, in a
chat and in a server. An image whose spread, 1 - rho, is `reference` keeps K; another one K times
its spread over `reference`, at least half of K and at most twice as many. Over images whose mean
spread is `reference`, and of which none reaches a bound, the mean is K.

Shapes: B images, N tokens, D features.
"""

import mlx.core as mx

from .numerics import choosing, on_host, rounded_cosine, unit

# The spread of an image that keeps K, if nothing is said: the mean of the built-in pictures, which
# range from 0.48 to 0.77, at the end of the built-in model's tower.
REFERENCE = 0.65
LEAST, MOST = 0.5, 2.0  # of K, that an image keeps


def spread_of_tokens(x_BND: mx.array) -> mx.array:
    """1 less the mean cosine similarity of two different tokens of each image, (B,): from 0, where
    all are alike, to little above 1. Called under `choosing()`."""
    unit_BND, N = unit(x_BND), x_BND.shape[1]
    total_BD = unit_BND.sum(axis=1)
    pairs_B = mx.square(total_BD).sum(axis=-1) - mx.square(unit_BND).sum(axis=(1, 2))
    return 1 - rounded_cosine(pairs_B / max(N * (N - 1), 1))


def image_budgets(x_BND: mx.array, K: int, reference: float) -> list[int]:
    """How many tokens each image keeps, 1 or more, from its tokens as the tower gave them.

    The one return to the host: shapes depend on it.
    """
    with choosing():
        (spreads,) = on_host(spread_of_tokens(x_BND))
    shares = (min(max(spread / reference, LEAST), MOST) for spread in spreads)
    return [max(1, int(K * share + 0.5)) for share in shares]
