"""What a pruner is given, `Signals`, and what it answers with, a `Reduction`.

Names are those of mlx_vlm_prune/pruners/contract.py, which explains each signal.

Shapes: B images, N visual tokens, K kept, D features, H heads, d head size, T words.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor


class Signals:
    """The tokens of B images, and those of the signals below that the method needs."""

    x_BND: Tensor
    grid: tuple[int, int]
    has_cls: bool
    frames: int
    cls_attention_BN: Tensor
    received_attention_BN: Tensor
    object_attention_BN: Tensor
    local_attention_BN: Tensor
    layer_attention_BN: Tensor
    cls_query_BHd: Tensor
    cls_key_BHd: Tensor
    queries_BNHd: Tensor
    keys_BNHd: Tensor
    cls_row_BN: Tensor
    values_BNHd: Tensor
    cls_value_BHd: Tensor
    accumulated_BN: Tensor
    pixels_BND: Tensor
    grey_BNP: Tensor
    patches_BND: Tensor
    size_BN: Tensor
    represented_BN: Tensor
    features_BND: Tensor
    sensitivity_BN: Tensor
    place_BN: Tensor
    text_BTD: Tensor
    text_real_BT: Tensor
    cls_rank_BN: Tensor
    entrance_BND: Tensor
    before_BND: Tensor
    normed_BND: Tensor
    keys_BND: Tensor
    text_keys_BTD: Tensor
    held_values_BNHd: Tensor
    text_values_BTHd: Tensor
    next_keys_BND: Tensor
    last_attention_BN: Tensor
    next_attention_BN: Tensor
    text_attention_BTN: Tensor
    text_share_BT: Tensor
    mean_attention_BN: Tensor
    prompt_attention_BN: Tensor
    twig_attention_BN: Tensor
    rotary_cosine_BN: Tensor
    rotary_sine_BN: Tensor

    def __init__(
        self, x_BND: Tensor, grid: tuple[int, int], has_cls: bool = True, frames: int = 1,
        **others: Tensor | None,
    ) -> None:  # fmt: skip
        assert others.keys() <= Signals.__annotations__.keys(), others.keys()
        self.__dict__ = {name: value for name, value in others.items() if value is not None}
        self.x_BND, self.grid, self.has_cls, self.frames = x_BND, grid, has_cls, frames

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor:
            if name in Signals.__annotations__:
                raise AssertionError(
                    f"{name} is missing: a method that reads it lists it in `needs`"
                )
            raise AttributeError(name)

    def get(self, name: str) -> Tensor | None:
        """A signal, or None."""
        assert name in Signals.__annotations__, name
        return self.__dict__.get(name)

    def replace(self, **changed: Any) -> "Signals":
        """A copy with these signals changed or added; None removes one."""
        return Signals(**{**self.__dict__, **changed})

    @property
    def constant(self) -> "Signals":
        """The same without gradients: a choice among tokens has none."""
        tensors = {k: v for k, v in self.__dict__.items() if isinstance(v, Tensor)}
        return self.replace(**{name: value.detach() for name, value in tensors.items()})

    def to(self, device: torch.device | str) -> "Signals":
        """The same elsewhere."""
        tensors = {k: v for k, v in self.__dict__.items() if isinstance(v, Tensor)}
        return self.replace(**{name: value.to(device) for name, value in tensors.items()})

    def per_token(self, change: Callable[[Tensor, int], Tensor]) -> "Signals":
        """A copy with `change(signal, dim of its tokens)` for all that is per token, x included."""
        changed: dict[str, Tensor] = {}
        for name, value in self.__dict__.items():
            letters = name.split("_")[-1]
            if "N" in letters:
                changed[name] = change(value, letters.index("N"))
        return self.replace(**changed)

    def take(self, index_BK: Tensor) -> "Signals":
        """The signals of some tokens; those that are not per token stay."""

        def entries(value: Tensor, dim: int) -> Tensor:
            shape = [1] * value.ndim
            shape[0], shape[dim] = index_BK.shape
            return value.take_along_dim(index_BK.reshape(shape), dim)

        return self.per_token(entries)


@dataclass(frozen=True)
class Reduction:
    """How N tokens become K slots: the token that stands for each, and the weights that mix it."""

    index_BK: Tensor | None = None
    weight_BKN: Tensor | None = None
    value_BND: Tensor | None = None
    place_BK: Tensor | None = None  # in which order a method of the tower left the slots

    def to(self, device: torch.device | str) -> "Reduction":
        """The same elsewhere."""
        tensors = (self.index_BK, self.weight_BKN, self.value_BND, self.place_BK)
        return Reduction(*(None if x is None else x.to(device) for x in tensors))

    def apply(self, x_BND: Tensor) -> Tensor:
        """Reduce (B, N, ...) to (B, K, ...)."""
        if self.weight_BKN is not None:
            return (self.weight_BKN.float() @ x_BND.float()).to(x_BND.dtype)
        assert self.index_BK is not None
        return x_BND.take_along_dim(self.index_BK[..., None], dim=1)

    def after(self, first: "Reduction | None", N: int) -> "Reduction":
        """The reduction of N tokens that does `first`, then this one."""
        if first is None:
            return self
        index = weight = None
        if self.index_BK is not None and first.index_BK is not None:
            index = first.index_BK.take_along_dim(self.index_BK, dim=1)
        if self.weight_BKN is None and first.weight_BKN is None:
            return Reduction(index)
        if self.weight_BKN is None:
            assert first.weight_BKN is not None and self.index_BK is not None
            weight = first.weight_BKN.take_along_dim(self.index_BK[..., None], dim=1)
        elif first.weight_BKN is None:
            assert first.index_BK is not None
            weight = torch.zeros(*self.weight_BKN.shape[:2], N).to(self.weight_BKN)
            column = first.index_BK[:, None].expand_as(self.weight_BKN)
            weight = weight.scatter(2, column, self.weight_BKN)
        else:
            weight = self.weight_BKN @ first.weight_BKN
        return Reduction(index, weight)

    def tokens(self, x_BND: Tensor) -> Tensor:
        """Reduce the tokens, or the learned values in their place, to (B, K, D)."""
        return self.apply(x_BND if self.value_BND is None else self.value_BND)


def layer_at(layer: float, depth: int) -> int:
    """A layer's number: below 1 a share of the depth, negative from the end."""
    if 0 < layer < 1:
        return min(depth - 1, max(1, int(layer * depth + 0.5)))
    if not -depth <= layer < depth:
        raise ValueError(f"there is no layer {layer}; give {-depth} to {depth - 1}")
    return int(layer) % depth


def index_reduction(signals: Signals, index: list[list[int]]) -> Reduction:
    """The reduction of a batch to the tokens chosen in each image."""
    return Reduction(torch.tensor(index, device=signals.x_BND.device, dtype=torch.long))


def weighted_reduction(signals: Signals, pairs: Iterable[tuple[list[int], Tensor]]) -> Reduction:
    """The reduction of a batch from each image's tokens and weights (K, N)."""
    index, weight = zip(*pairs, strict=True)
    weight_BKN = torch.stack(weight).float().to(signals.x_BND.device)
    return Reduction(index_reduction(signals, list(index)).index_BK, weight_BKN)
