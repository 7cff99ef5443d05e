"""A prompt's rows: images spliced among words, positions; `drop_rows` removes what a cut drops.

A prompt is one sequence of rows; between the decoder's layers it gets shorter.

Shapes: B prompts, n visual tokens of an image, K kept of them, T entries of the longest list,
L rows (of the longest prompt, where there are several), D features. A position is a number, or
several along a last axis where the model counts in several directions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import mlx.core as mx
import numpy as np

from ..inputs.prompt import Prompt
from ..pruners.contract import Policy, Reduction
from .cache import PADDING


@dataclass(frozen=True)
class ImageSlots:
    """One image's visual tokens (K, D), as the language model reads them.

    `index_K` is the place of each in the image; None of pooled slots, which have none. `bias_K` is
    added to the attention that they get; `rank_K` is their `cls_rank_BN`.
    """

    x_KD: mx.array
    index_K: mx.array | None
    bias_K: mx.array | None = None
    rank_K: mx.array | None = None


@dataclass(frozen=True)
class Spliced:
    """The prompts as rows, padded on the left.

    `added` holds what is added to the rows behind each of the first layers (DeepStack).
    """

    x_BLD: mx.array
    positions_BL: mx.array  # PADDING where there is no row
    next_B1: mx.array  # the position after each prompt
    lengths: list[int]  # rows of each prompt, padding left out
    runs: list[list[tuple[int, int]]]  # (start, n) of each prompt's images
    bias_BL: mx.array | None = None  # added to the attention a row gets
    added: list[mx.array] = field(default_factory=list)  # (B, L, D) each
    contiguous: bool = False  # does each prompt, unpadded, have a row at every position?
    first_bias_BL: mx.array | None = None  # in the first layer, in place of `bias_BL`
    # With `first_bias_BL`: what each row adds for one so many positions before it, while it is
    # read. Later tokens add nothing then.
    distance_BP: mx.array | None = None
    rank_BL: mx.array | None = None  # `cls_rank_BN` of visual rows, where a method needs it

    @property
    def L(self) -> int:
        return self.x_BLD.shape[1]

    @property
    def padding(self) -> list[int]:
        """How many rows of padding stand ahead of each prompt."""
        return [self.L - length for length in self.lengths]

    @property
    def is_real_BL(self) -> mx.array:
        """False on padding."""
        return mx.arange(self.L) >= mx.array(self.padding)[:, None]

    def after(self, rows: int) -> "Spliced":
        """What follows the first rows of a prompt without its neighbours, for layers that hold
        those; it knows of no images."""
        assert len(self.lengths) == 1, "one prompt"
        return replace(
            self,
            x_BLD=self.x_BLD[:, rows:],
            positions_BL=self.positions_BL[:, rows:],
            lengths=[self.lengths[0] - rows],
            runs=[[]],
            bias_BL=None if self.bias_BL is None else self.bias_BL[:, rows:],
        )

    @property
    def prompt_of(self) -> list[int]:
        """The prompt of each image."""
        return [b for b, runs in enumerate(self.runs) for _ in runs]

    @property
    def image_columns(self) -> list[range]:
        """The columns of each image's rows."""
        ahead = self.padding
        return [
            range(ahead[b] + start, ahead[b] + start + n)
            for b, runs in enumerate(self.runs)
            for start, n in runs
        ]

    @cached_property
    def word_columns(self) -> list[list[int]]:
        """The columns of each prompt's words."""
        return [
            [self.L - length + i for i in outside(runs, length)]
            for length, runs in zip(self.lengths, self.runs, strict=True)
        ]

    def rows(self, b: int) -> "Rows":
        """A prompt's rows without padding."""
        ahead = self.L - self.lengths[b]
        return Rows(
            self.x_BLD[b, ahead:],
            self.positions_BL[b, ahead:],
            None if self.bias_BL is None else self.bias_BL[b, ahead:],
            [y_BLD[b, ahead:] for y_BLD in self.added],
            rank_L=None if self.rank_BL is None else self.rank_BL[b, ahead:],
        )


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one prompt: words, an image, or several of these joined."""

    x_LD: mx.array
    positions_L: mx.array
    bias_L: mx.array | None = None  # added to the attention a row gets
    added: Sequence[mx.array] = ()  # (L, D) each, as of `Spliced`
    runs: Sequence[tuple[int, int]] = ()  # (start, n) of the images among them
    rank_L: mx.array | None = None  # `cls_rank_BN` of visual rows

    def __len__(self) -> int:
        return len(self.x_LD)

    def numbers(self, name: str) -> mx.array:
        """`bias_L` or `rank_L`; zeros where there are none."""
        numbers_L: mx.array | None = getattr(self, name)
        return mx.zeros(len(self)) if numbers_L is None else numbers_L

    def part(self, begin: int, end: int) -> "Rows":
        """Rows `begin` to `end`."""
        rows = slice(begin, end)
        bias_L = None if self.bias_L is None else self.bias_L[rows]
        added = [y_LD[rows] for y_LD in self.added]
        rank_L = None if self.rank_L is None else self.rank_L[rows]
        return Rows(self.x_LD[rows], self.positions_L[rows], bias_L, added, rank_L=rank_L)

    def reduced(self, kept: Reduction, bias_K: mx.array | None) -> "Rows":
        """An image's rows that stay, with what is added to the attention they get."""
        assert kept.index_BK is not None, "in the decoder every slot has its anchor"
        x_KD, index_K = kept.tokens(self.x_LD[None])[0], kept.index_BK[0]
        added = [kept.apply(y_LD[None])[0] for y_LD in self.added]
        rank_K = None if self.rank_L is None else self.rank_L[index_K]
        return Rows(x_KD, self.positions_L[index_K], bias_K, added, [(0, len(x_KD))], rank_K)

    def renumbered(self, end_1: mx.array) -> "Rows":
        """With positions that count up to `end_1`, the same along every axis."""
        length, axes = len(self), self.positions_L.shape[1:]
        count_L = (mx.arange(length) + (end_1 - length)).astype(mx.int32)
        count_L = count_L.reshape(length, *[1] * len(axes))
        return replace(self, positions_L=mx.broadcast_to(count_L, (length, *axes)))


def splice(
    embed: Callable[[mx.array], mx.array],
    prompts: Sequence[Prompt],
    images: Sequence[ImageSlots],
    policy: Policy,
) -> Spliced:
    """Put each image's slots where its placeholders stood.

    `keep`: a token keeps the position it had among all; `renumber`, which pooled slots need:
    positions count what is left.
    """

    def words(prompt: Prompt, begin: int, end: int) -> Rows:
        ids = mx.array(list(prompt.ids[begin:end]), dtype=mx.int32)
        return Rows(embed(ids), mx.arange(begin, end))

    slots, sequences = iter(images), []
    for prompt in prompts:
        parts, cursor = list[Rows](), 0
        for start, length in prompt.runs:
            parts += [words(prompt, cursor, start), _image_rows(next(slots), start)]
            cursor = start + length
        sequences.append(join_rows([*parts, words(prompt, cursor, len(prompt.ids))]))
    assert next(slots, None) is None, "every image has its placeholders"
    kept = [len(rows) for rows in sequences]
    lengths = [len(prompt.ids) for prompt in prompts]
    ends = lengths if policy == "keep" else kept
    next_B1 = mx.array(ends, dtype=mx.int32)[:, None]
    return pad_prompts(sequences, next_B1, policy, contiguous=kept == lengths)


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
    reductions, sequences = zip(kept, bias, strict=True), []
    for b, runs in enumerate(spliced.runs):
        rows, parts, cursor = spliced.rows(b), list[Rows](), 0
        for start, n in runs:
            image = rows.part(start, start + n)
            parts += [rows.part(cursor, start), image.reduced(*next(reductions))]
            cursor = start + n
        sequences.append(join_rows([*parts, rows.part(cursor, len(rows))]))
    contiguous = spliced.contiguous and spliced.lengths == [len(rows) for rows in sequences]
    return pad_prompts(sequences, spliced.next_B1, policy, contiguous)


def _image_rows(image: ImageSlots, start: int) -> Rows:
    """An image whose first placeholder stands at `start`; pooled slots are counted from there."""
    K = len(image.x_KD)
    index_K = mx.arange(K) if image.index_K is None else image.index_K
    return Rows(image.x_KD, start + index_K, image.bias_K, runs=[(0, K)], rank_L=image.rank_K)


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Rows one after another."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *map(len, parts)]).tolist()

    def joined(name: str) -> mx.array | None:
        if all(getattr(part, name) is None for part in parts):
            return None
        return mx.concatenate([part.numbers(name) for part in parts])

    return Rows(
        mx.concatenate([part.x_LD for part in parts]),
        mx.concatenate([part.positions_L for part in parts]),
        joined("bias_L"),
        [mx.concatenate(list(y)) for y in zip(*(part.added for part in parts), strict=True)],
        [(starts[i] + start, n) for i, part in enumerate(parts) for start, n in part.runs],
        joined("rank_L"),
    )


def pad_prompts(
    prompts: Sequence[Rows], next_B1: mx.array, policy: Policy, contiguous: bool
) -> Spliced:
    """Prompts padded on the left to the longest; renumbered positions end before the next.

    `contiguous` says whether positions count up one by one as they are.
    """
    lengths = [len(rows) for rows in prompts]
    L = max(lengths)
    if policy == "renumber":
        prompts = [rows.renumbered(next_1) for rows, next_1 in zip(prompts, next_B1, strict=True)]

    def padded(arrays: Sequence[mx.array], value: int = 0) -> mx.array:
        widths = [[(L - len(x), 0), *[(0, 0)] * (x.ndim - 1)] for x in arrays]
        pairs = zip(arrays, widths, strict=True)
        return mx.stack([mx.pad(x, width, constant_values=value) for x, width in pairs])

    def numbers(name: str) -> mx.array | None:
        if all(getattr(rows, name) is None for rows in prompts):
            return None
        return padded([rows.numbers(name) for rows in prompts])

    return Spliced(
        padded([rows.x_LD for rows in prompts]),
        padded([rows.positions_L.astype(mx.int32) for rows in prompts], PADDING),
        next_B1,
        lengths,
        [list(rows.runs) for rows in prompts],
        numbers("bias_L"),
        [padded(layer) for layer in zip(*(rows.added for rows in prompts), strict=True)],
        (contiguous or policy == "renumber") and min(lengths) == L,
        rank_BL=numbers("rank_L"),
    )


def outside(runs: Sequence[tuple[int, int]], length: int) -> list[int]:
    """Which of `length` places are in no run (start, length): those of the words."""
    inside = {i for start, n in runs for i in range(start, start + n)}
    return [i for i in range(length) if i not in inside]


def pad_right(lists: Sequence[Sequence[int]], value: int = 0) -> tuple[mx.array, mx.array]:
    """Lists as one array (B, T), filled up with `value`, and which entries are real."""
    T = max(1, *map(len, lists))
    filled = np.array([[*entries, *[value] * (T - len(entries))] for entries in lists], np.int32)
    is_real = np.arange(T) < np.array([[len(entries)] for entries in lists])
    return mx.array(filled), mx.array(is_real)
