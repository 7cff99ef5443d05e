"""Images among words: one sequence of rows per prompt, each with its position.

Between the decoder's layers the same sequences get shorter.

Shapes: B prompts, I images over all prompts, n visual tokens of an image, K kept of
them, T tokens of text, L rows of the longest prompt, D features. A position is a number, or
several along a last axis where the model counts in several directions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import numpy as np

from ..pruners.contract import Policy, Reduction

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
    """The prompts as rows, padded on the left.

    `added` holds what is added to the rows behind each of the first layers (DeepStack).
    """

    x_BLD: mx.array
    positions_BL: mx.array  # -1 is padding
    next_B1: mx.array  # the position after each prompt
    lengths: list[int]  # rows of each prompt, padding left out
    runs: list[list[tuple[int, int]]]  # (start, n) of each prompt's images
    bias_BL: mx.array | None = None  # added to the attention a row gets
    added: list[mx.array] = field(default_factory=list)  # (B, L, D) each

    @property
    def L(self) -> int:
        return self.x_BLD.shape[1]

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.L

    @property
    def is_real_BL(self) -> mx.array:
        """False on padding."""
        ahead = mx.array([[self.L - length] for length in self.lengths])
        return mx.arange(self.L) >= ahead

    @property
    def prompt_of(self) -> list[int]:
        """The prompt of each image."""
        return [b for b, runs in enumerate(self.runs) for _ in runs]

    @property
    def columns(self) -> list[range]:
        """The columns of each image's rows."""
        return [
            range(self.L - length + start, self.L - length + start + n)
            for length, runs in zip(self.lengths, self.runs, strict=True)
            for start, n in runs
        ]

    def text(self, prompts: Sequence[int]) -> tuple[mx.array, mx.array]:
        """Columns (B, T) of some prompts' words, padded at the end, and which of them are real."""
        columns = []
        for b in prompts:
            seen = {c for start, n in self.runs[b] for c in range(start, start + n)}
            length = self.lengths[b]
            columns.append([self.L - length + c for c in range(length) if c not in seen])
        T = max(map(len, columns))
        real = np.array([[i < len(words) for i in range(T)] for words in columns])
        padded = np.array([words + [self.L - 1] * (T - len(words)) for words in columns])
        return mx.array(padded), mx.array(real)

    def piece(self, b: int, begin: int, end: int) -> "Piece":
        """Some columns of a prompt, without the attention that is added to an image's rows."""
        part = slice(begin, end)
        added = [y_BLD[b, part] for y_BLD in self.added]
        return Piece(self.x_BLD[b, part], self.positions_BL[b, part], added=added)


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a prompt: words, or an image."""

    x_LD: mx.array
    positions_L: mx.array | None  # None where they are counted anyway
    bias_L: mx.array | None = None
    added: list[mx.array] = field(default_factory=list)
    is_image: bool = False

    def reduced(self, kept: Reduction, bias_K: mx.array | None) -> "Piece":
        """An image's rows that stay."""
        assert kept.index_BK is not None, "in the decoder every slot has its anchor"
        assert self.positions_L is not None
        return Piece(
            kept.tokens(self.x_LD[None])[0],
            self.positions_L[kept.index_BK[0]],
            bias_K,
            [kept.apply(y_LD[None])[0] for y_LD in self.added],
            is_image=True,
        )


def splice(
    embed: Callable[[mx.array], mx.array],
    rows: Sequence[Row],
    visual: Sequence[Visual],
    policy: Policy,
) -> Spliced:
    """Put each image's slots where its placeholders stood.

    `keep`: a token keeps the position it had among all; `renumber`, which slots without a place
    need: positions count what is left.
    """
    images, prompts = iter(visual), []
    for row in rows:
        pieces, cursor = [], 0
        for start, length in row.runs:
            image = next(images)
            place_K = None if image.index_K is None else start + image.index_K
            pieces.append(Piece(embed(_ids(row.ids[cursor:start])), mx.arange(cursor, start)))
            pieces.append(Piece(image.x_KD, place_K, image.bias_K, is_image=True))
            cursor = start + length
        end = Piece(embed(_ids(row.ids[cursor:])), mx.arange(cursor, len(row.ids)))
        prompts.append([*pieces, end])
    assert next(images, None) is None, "every image has its placeholders"
    if policy == "keep":
        return join(prompts, mx.array([[len(row.ids)] for row in rows], dtype=mx.int32))
    lengths = [sum(len(piece.x_LD) for piece in pieces) for pieces in prompts]
    return join(prompts, mx.array(lengths, dtype=mx.int32)[:, None], counted=True)


def drop_rows(
    spliced: Spliced,
    kept: Sequence[Reduction],
    bias: Sequence[mx.array | None],
    policy: Policy,
) -> Spliced:
    """The sequences with each image's rows reduced, in the decoder.

    With `renumber` the rows that stay count up to the position that comes next, which is the
    same in all layers: rotation knows differences only.
    """
    reductions, prompts = zip(kept, bias, strict=True), []
    for b, runs in enumerate(spliced.runs):
        first = cursor = spliced.L - spliced.lengths[b]
        pieces = []
        for start, n in runs:
            begin = first + start
            image = spliced.piece(b, begin, begin + n)
            pieces += [spliced.piece(b, cursor, begin), image.reduced(*next(reductions))]
            cursor = begin + n
        prompts.append([*pieces, spliced.piece(b, cursor, spliced.L)])
    return join(prompts, spliced.next_B1, counted=policy == "renumber")


def join(prompts: list[list[Piece]], next_B1: mx.array, counted: bool = False) -> Spliced:
    """Each prompt's pieces in a row, padded on the left; `counted` positions end before the
    next."""
    lengths = [sum(len(piece.x_LD) for piece in pieces) for pieces in prompts]
    L = max(lengths)

    def rows(parts: list[mx.array], value: int = 0) -> mx.array:
        """Of one prompt."""
        row_L = mx.concatenate(parts) if len(parts) > 1 else parts[0]
        ahead = [(L - len(row_L), 0)] + [(0, 0)] * (row_L.ndim - 1)
        return mx.pad(row_L, ahead, constant_values=value)

    x_BLD = mx.stack([rows([p.x_LD for p in pieces]) for pieces in prompts])
    bias_BL = None
    if any(p.bias_L is not None for pieces in prompts for p in pieces):
        bias = [
            [mx.zeros(len(p.x_LD)) if p.bias_L is None else p.bias_L for p in pieces]
            for pieces in prompts
        ]
        bias_BL = mx.stack([rows(parts) for parts in bias])
    depth = len(prompts[0][0].added)
    added = [
        mx.stack([rows([p.added[layer] for p in pieces]) for pieces in prompts])
        for layer in range(depth)
    ]
    positions_BL = mx.stack(
        [
            rows([_counted(pieces, next_B1[b])] if counted else _positions(pieces), PADDING)
            for b, pieces in enumerate(prompts)
        ]
    )
    return Spliced(x_BLD, positions_BL, next_B1, lengths, _runs(prompts), bias_BL, added)


def _positions(pieces: list[Piece]) -> list[mx.array]:
    positions = [p.positions_L for p in pieces if p.positions_L is not None]
    return [positions_L.astype(mx.int32) for positions_L in positions]


def _counted(pieces: list[Piece], next_1: mx.array) -> mx.array:
    """Positions (L,) up to the next, or (L, A) along as many axes as there are."""
    length = sum(len(piece.x_LD) for piece in pieces)
    position_L = (mx.arange(length) + (next_1 - length)).astype(mx.int32)
    axes = next(p.positions_L for p in pieces if p.positions_L is not None).shape[1:]
    return mx.broadcast_to(position_L.reshape(length, *[1] * len(axes)), (length, *axes))


def _runs(prompts: list[list[Piece]]) -> list[list[tuple[int, int]]]:
    """Where each prompt's images begin, and how many rows they have."""
    runs = []
    for pieces in prompts:
        starts = np.cumsum([0, *(len(p.x_LD) for p in pieces)]).tolist()
        pairs = zip(starts, pieces, strict=False)
        runs.append([(start, len(p.x_LD)) for start, p in pairs if p.is_image])
    return runs


def _ids(ids: Sequence[int]) -> mx.array:
    return mx.array(list(ids), dtype=mx.int32)
