"""Images among words: one sequence of rows per prompt, each with its position.

Between the decoder's layers the same sequences get shorter.

Shapes: B prompts, I images over all prompts, n visual tokens of an image, K kept of
them, T tokens of text, L rows of the longest prompt, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from .pruners.contract import Policy, Reduction, take

PADDING = -1  # the position of a row that is not there


class Row(Protocol):
    """One prompt: token ids, and where each image's placeholders stand (start, length)."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def runs(self) -> Sequence[tuple[int, int]]: ...


@dataclass(frozen=True)
class Visual:
    """One image's slots: the tokens (K, D), their places in the image (K,) or None where they
    have none, and what is added to the attention they get (K,) or None."""

    x_KD: mx.array
    index_K: mx.array | None
    bias_K: mx.array | None = None


@dataclass(frozen=True)
class Spliced:
    """The prompts as rows, padded on the left."""

    x_BLD: mx.array
    positions_BL: mx.array  # -1 is padding
    next_B1: mx.array  # the position after each prompt
    lengths: list[int]  # rows of each prompt, padding left out
    runs: list[list[tuple[int, int]]]  # (start, n) of each prompt's images
    bias_BL: mx.array | None = None  # added to the attention a row gets

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.positions_BL.shape[1]

    @property
    def where(self) -> tuple[mx.array, mx.array]:
        """Prompts (I, 1) and columns (I, n) of all images' rows; all images have as many."""
        L = self.positions_BL.shape[1]
        at = [
            (b, range(L - length + start, L - length + start + n))
            for b, (length, runs) in enumerate(zip(self.lengths, self.runs, strict=True))
            for start, n in runs
        ]
        prompts = np.array([[b] for b, _ in at])
        columns = np.array([list(columns) for _, columns in at], dtype=np.int32)
        return mx.array(prompts), mx.array(columns)

    def text(self, images: bool) -> tuple[mx.array, mx.array]:
        """Columns (B, T) of the words, padded at the end, and which of them are real; with
        `images` once for each image (I, T)."""
        L = self.positions_BL.shape[1]
        columns = []
        for length, runs in zip(self.lengths, self.runs, strict=True):
            seen = {c for start, n in runs for c in range(start, start + n)}
            words = [L - length + c for c in range(length) if c not in seen]
            columns += [words] * (len(runs) if images else 1)
        T = max(map(len, columns))
        real = np.array([[i < len(words) for i in range(T)] for words in columns])
        padded = np.array([words + [L - 1] * (T - len(words)) for words in columns])
        return mx.array(padded), mx.array(real)


def splice(
    embed: Callable[[mx.array], mx.array],
    rows: Sequence[Row],
    visual: Sequence[Visual],
    policy: Policy,
) -> Spliced:
    """Put each image's slots where its placeholders stood.

    `keep`: a token keeps the position it had among all; `renumber`, and slots without a
    place: positions count what is left.
    """
    images, prompts = iter(visual), []
    for row in rows:
        pieces, cursor = [], 0
        for start, length in row.runs:
            image = next(images)
            place_K = None if image.index_K is None else start + image.index_K
            words = embed(_ids(row.ids[cursor:start])), mx.arange(cursor, start)
            pieces += [_Piece(*words), _Piece(image.x_KD, place_K, image.bias_K, True)]
            cursor = start + length
        end = embed(_ids(row.ids[cursor:])), mx.arange(cursor, len(row.ids))
        prompts.append([*pieces, _Piece(*end)])
    assert next(images, None) is None, "every image has its placeholders"
    renumber = policy == "renumber" or any(image.index_K is None for image in visual)
    full = mx.array([[len(row.ids)] for row in rows], dtype=mx.int32)
    return _pad(prompts, None if renumber else full)


def shorten(told: Spliced, kept: Reduction, bias_IK: mx.array | None, policy: Policy) -> Spliced:
    """The sequences with each image's rows reduced, in the decoder."""
    assert kept.index_BK is not None, "in the decoder every slot has its anchor"
    at = told.where
    x_IKD, place_IK = kept.tokens(told.x_BLD[at]), take(told.positions_BL[at], kept.index_BK)
    image, prompts, L = 0, [], told.positions_BL.shape[1]
    for b, runs in enumerate(told.runs):
        pieces, cursor = [], L - told.lengths[b]
        begin = cursor
        for start, n in runs:
            pieces.append(_piece(told, b, cursor, begin + start))
            bias_K = None if bias_IK is None else bias_IK[image]
            pieces.append(_Piece(x_IKD[image], place_IK[image], bias_K, True))
            cursor, image = begin + start + n, image + 1
        prompts.append([*pieces, _piece(told, b, cursor, L)])
    return _pad(prompts, None if policy == "renumber" else told.next_B1)


@dataclass(frozen=True)
class _Piece:
    x_LD: mx.array
    place_L: mx.array | None
    bias_L: mx.array | None = None
    is_image: bool = False


def _piece(told: Spliced, b: int, begin: int, end: int) -> _Piece:
    """Words: an image's rows get their own attention, words never do."""
    return _Piece(told.x_BLD[b, begin:end], told.positions_BL[b, begin:end])


def _ids(ids: Sequence[int]) -> mx.array:
    return mx.array(list(ids), dtype=mx.int32)


def _pad(prompts: list[list[_Piece]], next_B1: mx.array | None) -> Spliced:
    """Join each prompt's pieces; without the next positions, positions count."""
    lengths = [sum(len(p.x_LD) for p in pieces) for pieces in prompts]
    L, xs, places, biases, runs = max(lengths), [], [], [], []
    for pieces, length in zip(prompts, lengths, strict=True):
        ahead = L - length
        xs.append(mx.pad(mx.concatenate([p.x_LD for p in pieces]), [(ahead, 0), (0, 0)]))
        place_L = mx.arange(length)
        if next_B1 is not None:
            told = [p.place_L for p in pieces if p.place_L is not None]
            place_L = mx.concatenate([place.astype(mx.int32) for place in told])
        places.append(mx.pad(place_L.astype(mx.int32), [(ahead, 0)], constant_values=PADDING))
        bias = [mx.zeros(len(p.x_LD)) if p.bias_L is None else p.bias_L for p in pieces]
        biases.append(mx.pad(mx.concatenate(bias), [(ahead, 0)]))
        starts = np.cumsum([0, *(len(p.x_LD) for p in pieces)]).tolist()
        runs.append(
            [(at, len(p.x_LD)) for at, p in zip(starts, pieces, strict=False) if p.is_image]
        )
    biased = any(p.bias_L is not None for pieces in prompts for p in pieces)
    if next_B1 is None:
        next_B1 = mx.array(lengths, dtype=mx.int32)[:, None]
    bias_BL = mx.stack(biases) if biased else None
    return Spliced(mx.stack(xs), mx.stack(places), next_B1, lengths, runs, bias_BL)
