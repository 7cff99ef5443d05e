"""What most families share.

Shapes: I pictures, N visual tokens of one, k kept of all, S tokens with CLS, H heads, d head size,
L rows of the prompt, l left, D features.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from ....pruners.contract import Reduction, Signals


def mark(model: Any, told: Mapping[str, Any]) -> int:
    """The id of the placeholder."""
    return model.config.image_token_index


def left(
    ids: Sequence[int], placeholder: int, seen: Sequence[Signals], kept: Sequence[Reduction]
) -> mx.array:
    """The rows (l,) of all words, and of each kept token's own placeholder."""
    at = np.flatnonzero(np.array(ids) == placeholder)
    sizes = [one.x_BND.shape[1] for one in seen]
    if len(at) != sum(sizes):
        raise ValueError(
            f"the prompt has room for {len(at)} visual tokens and the images have {sum(sizes)}"
        )
    begins = np.cumsum([0, *sizes])
    own = [a + np.array(one.index_BK)[0] for a, one in zip(begins, kept, strict=False)]
    rows = np.setdiff1d(np.arange(len(ids)), np.delete(at, np.concatenate(own).astype(int)))
    return mx.array(rows.astype(np.int32))


def hand_over(model: Any, x_1kD: mx.array, is_full: bool) -> Any:
    """All embeddings in a row, as one picture's."""
    return x_1kD


def pictures(x_IND: mx.array, grid: tuple[int, int]) -> list[Signals]:
    """One after another."""
    return [Signals(x_IND[i : i + 1], grid) for i in range(len(x_IND))]


def grouped(seen: Sequence[Signals], tiles: Sequence[int]) -> list[list[Signals]]:
    """The pictures of each image, which was cut into so many."""
    if sum(tiles) != len(seen):
        raise ValueError(f"the images gave {len(seen)} pictures, the prompt tells of {sum(tiles)}")
    ends = np.cumsum([0, *tiles]).tolist()
    return [list(seen[a:b]) for a, b in pairwise(ends)]


def only(pixels: mx.array) -> mx.array:
    """The pixels, if they are one image's: of several, mlx-vlm would show the first alone."""
    if len(pixels) != 1:
        raise ValueError(f"pruned.py reads one image with this model, not {len(pixels)}")
    return pixels


def attended(x_IND: mx.array, grid: tuple[int, int], seen_IN: mx.array) -> list[Signals]:
    """Pictures, one after another, with what CLS attends to in each."""
    parts = [slice(i, i + 1) for i in range(len(x_IND))]
    return [Signals(x_IND[own], grid, cls_attention_BN=seen_IN[own]) for own in parts]


def cls_attention(q_IHSd: mx.array, k_IHSd: mx.array) -> mx.array:
    """What CLS, which comes first, attends to: the mean over heads, (I, N)."""
    logits_IH1S = (q_IHSd[:, :, :1] @ k_IHSd.swapaxes(2, 3)).astype(mx.float32)
    return mx.softmax(logits_IH1S * k_IHSd.shape[-1] ** -0.5, axis=-1).mean(axis=1)[:, 0, 1:]
