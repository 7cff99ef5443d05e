"""What a pruner is given, `Signals`, and what it answers with, a `Reduction`.

Shapes: B images, N visual tokens, K kept slots, D features, H heads, d head size,
T tokens of text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx
import numpy as np

from .numerics import NotFiniteError, choosing
from .shares import mixed_sizes, next_slots, weighing_sizes, weighted


class Stage(IntEnum):
    """Where in the model a method works, from front to back."""

    IMAGE = 0  # the image itself
    ENCODER = 1  # between the tower's layers
    FEATURES = 2  # after the tower
    PROJECTED = 3  # after the projector
    DECODER = 4  # between the language model's layers
    ENHANCER = 5  # beside another method, whose selection it improves


Policy = Literal["keep", "renumber"]  # of the positions of kept tokens


def token_axis(name: str) -> int | None:
    """The axis of a signal along which its visual tokens lie: the place of N in its name's suffix,
    where every axis has one letter. None for a signal that is not per token."""
    axis = name.rpartition("_")[2].find("N")
    return None if axis < 0 else axis


class Signals:
    """The tokens of B images, and those of the signals below that the method needs.

    A method lists the others in its `needs`; the host computes only those. Reading one that is
    missing is an error; `get` reads an optional one. Attention is a mean over heads: one row, or
    column means that are computed without an N x N array.
    """

    x_BND: mx.array  # the tokens
    grid: tuple[int, int]  # (rows, columns) of the whole image
    has_cls: bool  # does a CLS token stand before them, between the tower's layers?
    frames: int  # of a clip, whose frames stand below one another in the grid; 1 of an image
    # Of a layer of the tower.
    cls_attention_BN: mx.array  # from CLS
    received_attention_BN: mx.array  # from all queries, the mean
    object_attention_BN: mx.array  # the same in another, earlier layer
    local_attention_BN: mx.array  # from CLS, in an earlier layer
    layer_attention_BN: mx.array  # from all queries, in the layer inside which tokens leave
    cls_query_BHd: mx.array
    cls_key_BHd: mx.array
    queries_BNHd: mx.array
    keys_BNHd: mx.array
    # Of the layer of the tower inside which tokens leave.
    cls_row_BN: mx.array  # from CLS
    values_BNHd: mx.array
    cls_value_BHd: mx.array
    accumulated_BN: mx.array  # a method's scores up to there, see `Method.accumulate`
    # Of the tower's input.
    pixels_BND: mx.array  # the pixels of each patch
    grey_BNP: mx.array  # the same as greys
    patches_BND: mx.array  # patch embeddings, without positions
    size_BN: mx.array  # how many tokens of the image each stands for
    represented_BN: mx.array  # how many, with those that left the tower for it: for an enhancer
    features_BND: mx.array  # the tokens as the tower gave them, ahead of the projector
    sensitivity_BN: mx.array  # how the projector answers small changes, by the method's `probe`
    place_BN: mx.array  # its place in the order in which the last merge in the tower left them
    # Of the prompt around each image: the language model's embeddings; in the decoder its
    # hidden states after the final norm of the words after the image.
    text_BTD: mx.array
    text_real_BT: mx.array  # False on padding
    # Of the decoder, at the layer whose input the tokens are.
    cls_rank_BN: mx.array  # the share of the tokens that entered with more attention from CLS
    entrance_BND: mx.array  # the tokens as the first layer reads them
    before_BND: mx.array  # the tokens one layer earlier, in a tower too
    normed_BND: mx.array  # the tokens after the final norm
    keys_BND: mx.array  # of the layer before, heads side by side
    text_keys_BTD: mx.array
    held_values_BNHd: mx.array  # of the layer before
    text_values_BTHd: mx.array
    next_keys_BND: mx.array  # of this layer, heads side by side
    last_attention_BN: mx.array  # the prompt's last token, in the layer before
    next_attention_BN: mx.array  # the prompt's last token, in this layer
    text_attention_BTN: mx.array  # every word after the image, in the layer before
    text_share_BT: mx.array  # a word's share of a softmax over them, see `LayerInput.text_share`
    mean_attention_BN: mx.array  # the mean visual query to the keys of this layer, not rotated
    prompt_attention_BN: mx.array  # the same of all rows up to the prompt's last visual token
    twig_attention_BN: mx.array  # the prompt's last token, in a twig's last layer
    rotary_cosine_BN: mx.array  # the mean of those by which the language model rotates its position
    rotary_sine_BN: mx.array

    def __init__(
        self, x_BND: mx.array, grid: tuple[int, int], has_cls: bool = True, frames: int = 1,
        **others: mx.array | None,
    ) -> None:  # fmt: skip
        """`others` by the names above; None is a missing one."""
        present = {name: signal for name, signal in others.items() if signal is not None}
        assert set(present) <= SIGNALS, f"{sorted(set(present) - SIGNALS)} are no signals"
        vars(self).update(present, x_BND=x_BND, grid=grid, has_cls=has_cls, frames=frames)

    if not TYPE_CHECKING:  # for a type checker, every signal declared above is an array

        def __getattr__(self, name: str) -> Any:
            """Fail for a missing signal."""
            if name not in SIGNALS:
                raise AttributeError(f"{name} is no signal")
            raise AssertionError(f"{name} is missing: a method that reads it lists it in `needs`")

    def get(self, name: str) -> mx.array | None:
        """A signal, or None."""
        assert name in SIGNALS, f"{name} is no signal"
        return vars(self).get(name)

    @property
    def arrays(self) -> dict[str, mx.array]:
        """The tokens and the signals, by name."""
        return {n: signal for n, signal in vars(self).items() if isinstance(signal, mx.array)}

    def replace(self, **changed: Any) -> "Signals":
        """A copy with these signals changed or added; None removes one."""
        return Signals(**{**vars(self), **changed})

    @property
    def constant(self) -> "Signals":
        """The same without gradients: a choice among tokens has none."""
        return self.replace(**{name: mx.stop_gradient(a) for name, a in self.arrays.items()})

    @property
    def is_whole(self) -> bool:
        """Are the tokens still all of the grid, in raster order?"""
        return self.x_BND.shape[1] == self.grid[0] * self.grid[1]

    def of_image(self, image: int) -> "Signals":
        """The signals of one image of the batch."""
        return self.replace(**{name: a[image : image + 1] for name, a in self.arrays.items()})

    def per_token(self, change: Callable[[mx.array, int], mx.array | None]) -> "Signals":
        """A copy with `change(signal, axis of its tokens)` in place of every signal that is per
        token, except the tokens themselves."""
        changed: dict[str, mx.array | None] = {}
        for name, signal in self.arrays.items():
            if name != "x_BND" and (axis := token_axis(name)) is not None:
                changed[name] = change(signal, axis)
        return self.replace(**changed)

    def reduced(self, kept: "Reduction") -> "Signals":
        """The signals of the kept slots; of slots without an index, the tokens and those that are
        not per token."""

        def entries(signal: mx.array, axis: int) -> mx.array | None:
            return None if kept.index_BK is None else take(signal, kept.index_BK, axis)

        return self.per_token(entries).replace(x_BND=kept.tokens(self.x_BND))


SIGNALS = set(Signals.__annotations__)


def take(x: mx.array, index_BK: mx.array, axis: int = 1) -> mx.array:
    """The entries of x at each batch row's indices, along an axis."""
    shape = [len(index_BK) if i == 0 else -1 if i == axis else 1 for i in range(x.ndim)]
    return mx.take_along_axis(x, index_BK.reshape(shape), axis=axis)


def segment_sum(x_BND: mx.array, slot_BN: mx.array, K: int) -> mx.array:
    """The sums of the entries of x by slot, (B, K, D); those without a slot, -1, must be 0, and are
    added to the last."""
    B, _, D = x_BND.shape
    image_B1 = mx.array([[b] for b in range(B)], dtype=slot_BN.dtype)
    return mx.zeros((B, K, D), dtype=x_BND.dtype).at[image_B1, slot_BN].add(x_BND)


@dataclass(frozen=True)
class Reduction:
    """How N tokens become K slots.

    `index_BK`, ascending and distinct: the token that stands for each slot, whose position the
    slot takes. None where every slot is pooled from all tokens: such slots are renumbered.
    `weight_BKN`: the weights by which each slot is mixed from the N tokens. None: each slot is its
    token, unchanged.
    `value_BND`: what a method mixes in place of the tokens.
    `slot_BN`, `share_BN`: the same as weights, where every token is mixed into at most one slot:
    its slot, -1 where it is dropped, and its weight there, 0 where it is dropped.
    `place_BK`: the slots' places in the order in which a method of the tower left them.
    `is_finite`: whether all tokens that it was chosen from are finite numbers, see `check`.
    `score_BN`: what the tokens were ranked by, the highest first, NaN of those that had left; for
    pictures. None of a method that ranks no single tokens.
    """

    index_BK: mx.array | None = None
    weight_BKN: mx.array | None = None
    value_BND: mx.array | None = None
    slot_BN: mx.array | None = None
    share_BN: mx.array | None = None
    place_BK: mx.array | None = None
    is_finite: mx.array | None = None
    score_BN: mx.array | None = None

    @classmethod
    def merge(
        cls,
        index_BK: mx.array,
        slot_BN: mx.array,
        size_BN: mx.array | None = None,
        place_BK: mx.array | None = None,
    ) -> "Reduction":
        """The means of the tokens that each slot has, weighted by their sizes."""
        size_BN = mx.array(1.0) if size_BN is None else size_BN
        size_BN = mixed_sizes(size_BN, slot_BN)
        total_BK = segment_sum(size_BN[..., None], slot_BN, index_BK.shape[1])[..., 0]
        share_BN = size_BN / take(total_BK, slot_BN)
        return cls(index_BK, slot_BN=slot_BN, share_BN=share_BN, place_BK=place_BK)

    @property
    def merges(self) -> bool:
        """Are slots mixed from several tokens?"""
        return self.weight_BKN is not None or self.slot_BN is not None

    def apply(self, x_BND: mx.array) -> mx.array:
        """Reduce (B, N, D) tokens, positions or sizes to (B, K, D)."""
        if self.slot_BN is not None and self.share_BN is not None:
            part_BND = weighted(self.share_BN[..., None], x_BND)
            return segment_sum(part_BND, self.slot_BN, self.slots).astype(x_BND.dtype)
        if self.weight_BKN is not None:
            mixed = self.weight_BKN.astype(mx.float32) @ x_BND.astype(mx.float32)
            return mixed.astype(x_BND.dtype)
        assert self.index_BK is not None, "a reduction needs an index or weights"
        return take(x_BND, self.index_BK)

    def tokens(self, x_BND: mx.array) -> mx.array:
        """Reduce the tokens, or the values in their place, to (B, K, D)."""
        return self.apply(x_BND if self.value_BND is None else self.value_BND)

    def mixture(self, N: int) -> mx.array:
        """The weights (B, K, N); one-hot where slots are tokens unchanged."""
        if self.weight_BKN is not None:
            return self.weight_BKN.astype(mx.float32)
        if self.slot_BN is not None and self.share_BN is not None:
            is_member_BKN = self.slot_BN[:, None] == mx.arange(self.slots)[:, None]
            return is_member_BKN * self.share_BN[:, None]
        assert self.index_BK is not None
        return (self.index_BK[..., None] == mx.arange(N)).astype(mx.float32)

    def after(self, first: "Reduction", N: int) -> "Reduction":
        """The reduction of N tokens that does `first`, then this one."""
        index = None
        if self.index_BK is not None and first.index_BK is not None:
            index = take(first.index_BK, self.index_BK)
        is_finite = self.is_finite if first.is_finite is None else first.is_finite
        if self.is_finite is not None and first.is_finite is not None:
            is_finite = self.is_finite & first.is_finite
        others: Any = {"is_finite": is_finite, "score_BN": self._score_among(first, N)}
        if self.weight_BKN is not None or first.weight_BKN is not None:
            between = first.mixture(N)
            weight = self.mixture(between.shape[1]) @ between
            return Reduction(index, weight, **others)
        if not (self.merges or first.merges):
            return Reduction(index, **others)
        (slot_Bn, share_Bn), (slot_BN, share_BN) = self.members(first.slots), first.members(N)
        share_BN = share_BN * take(share_Bn, slot_BN)
        slot_BN = next_slots(slot_BN, take(slot_Bn, slot_BN))
        return Reduction(index, slot_BN=slot_BN, share_BN=share_BN, **others)

    def _score_among(self, first: "Reduction", N: int) -> mx.array | None:
        """`score_BN` of the tokens that `first` left, among all N."""
        if self.score_BN is None or first.index_BK is None:
            return None
        with choosing():
            absent_BN = mx.full((len(self.score_BN), N), mx.nan, self.score_BN.dtype)
            return mx.put_along_axis(absent_BN, first.index_BK, self.score_BN, axis=1)

    def members(self, N: int) -> tuple[mx.array, mx.array]:
        """`slot_BN` and `share_BN`, where slots are tokens unchanged too."""
        if self.slot_BN is not None and self.share_BN is not None:
            return self.slot_BN, self.share_BN
        assert self.index_BK is not None
        B, K = self.index_BK.shape
        slot_BK = mx.broadcast_to(mx.arange(K, dtype=mx.int32), (B, K))
        slot_BN = mx.put_along_axis(mx.full((B, N), -1, mx.int32), self.index_BK, slot_BK, axis=1)
        return slot_BN, (slot_BN >= 0).astype(mx.float32)

    def sizes(self, size_BN: mx.array) -> mx.array:
        """The sum of the sizes of all tokens that each slot is mixed from, (B, K)."""
        if self.weight_BKN is not None:
            return ((self.weight_BKN > 0) @ size_BN[..., None])[..., 0]
        slot_BN, share_BN = self.members(size_BN.shape[1])
        part_BN = weighing_sizes(size_BN, share_BN)
        return segment_sum(part_BN[..., None], slot_BN, self.slots)[..., 0]

    def of_image(self, image: int) -> "Reduction":
        """The reduction of one image of the batch."""
        return self.of_images(slice(image, image + 1))

    def of_images(self, images: slice | mx.array) -> "Reduction":
        """The reduction of some images of the batch."""
        parts = {name: part[images] for name, part in self.parts.items()}
        score = None if self.score_BN is None else self.score_BN[images]
        return Reduction(**parts, is_finite=self.is_finite, score_BN=score)

    def check(self) -> None:
        """Raise UserError where tokens were not finite: the choice among them means nothing.

        Where choices are made on a GPU, this waits for whoever reads the choice on the host.
        """
        if self.is_finite is not None and not self.is_finite.item():
            raise NotFiniteError

    def kept_tokens(self) -> np.ndarray | None:
        """The index on the host, (B, K); None of pooled slots. Raises UserError, see `check`."""
        self.check()
        return None if self.index_BK is None else np.array(self.index_BK).astype(int)

    @property
    def slots(self) -> int:
        """K."""
        part = self.weight_BKN if self.index_BK is None else self.index_BK
        assert part is not None
        return part.shape[1]

    @property
    def parts(self) -> dict[str, mx.array]:
        """Its arrays that have a row for each image, by name."""
        names = ("index_BK", "weight_BKN", "value_BND", "slot_BN", "share_BN", "place_BK")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    @cached_property
    def arrays(self) -> list[mx.array]:
        """Its arrays, to evaluate together."""
        return list(self.parts.values())


def identity(x_BND: mx.array) -> Reduction:
    """Every token stands for itself."""
    return Reduction(index_BK=mx.broadcast_to(mx.arange(x_BND.shape[1]), x_BND.shape[:2]))
