"""PruneSID's budgets (arXiv:2603.09480): an image keeps tokens as it has unlike ones.

Shapes: N tokens, D features.
"""

from torch import Tensor

from .numerics import cosine


def by_similarity(x_ND: Tensor, K: int, reference: float) -> int:
    """K times 1 less the mean cosine of all pairs, over the reference; half to twice K."""
    N = len(x_ND)
    rho = float(cosine(x_ND.detach()).triu(diagonal=1).sum()) / max(1, N * (N - 1) // 2)
    share = (1 - round(rho, 12)) / reference
    return max(1, int(K * min(max(share, 0.5), 2.0) + 0.5))
