"""What every pruned.py has: its settings, how many tokens stay, and which.

Shapes: B pictures (one at a time here), N visual tokens, K kept, D features.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ...pruners.contract import Reduction, Signals
from .method import prune

KEEP_RATIO: float | None = 0.25  # of each image's visual tokens
KEEP_TOKENS: int | None = None  # or so many of each image's
OPTIONS: dict[str, Any] = {}  # of the method
LAYER = -1  # whose CLS attention is read, of those up to the one that the features come from
GLOBAL_IMAGE = 0  # the token before the last tile of an image, which shows all of it


def shares(sizes: Sequence[int]) -> list[int]:
    """An image's budget, shared among its pictures in proportion to their N."""
    N, K = sum(sizes), KEEP_TOKENS
    if KEEP_RATIO is not None:
        K = max(1, int(N * KEEP_RATIO + 1e-9))
    if K is None or not 1 <= K <= N:
        raise ValueError(f"pruned.py cannot keep {K} visual tokens of an image that has {N}")
    own = np.diff(K * np.cumsum([0, *sizes]) // N).tolist()
    if min(own) < 1:
        raise ValueError(f"an image in {len(sizes)} crops cannot keep {K} visual tokens: keep more")
    return own


def keep(seen: Signals, K: int) -> Reduction:
    """K tokens by the method; all as they are where there are no more."""
    N = seen.x_BND.shape[1]
    return prune(seen, K, **OPTIONS) if K < N else Reduction(mx.arange(N)[None])


def layer_of(depth: int) -> int:
    """LAYER, counted from the front."""
    if not -depth <= LAYER < depth:
        raise ValueError(f"LAYER of pruned.py is {LAYER}; there are layers 0 to {depth - 1}")
    return LAYER % depth


def one_prompt(input_ids: mx.array) -> list[int]:
    """Its ids. Prompts side by side would each need rows of their own."""
    if len(input_ids) != 1:
        raise ValueError(f"pruned.py reads one prompt with images at a time, not {len(input_ids)}")
    return np.array(input_ids[0]).tolist()
