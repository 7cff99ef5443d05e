"""What methods read of a prompt while they choose, for pictures; nothing is held elsewhere.

Shapes: B images, N tokens that a method chose from, T words of the prompt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import mlx.core as mx

from .contract import Reduction, Signals
from .numerics import choosing, cosine


@dataclass(frozen=True)
class WordChoice:
    """A choice of a method that reads the prompt word by word: how much of each word's attention
    each token got, or how like it is, (B, T, N), and which words are real."""

    name: str
    kept: Reduction
    words_BTN: mx.array
    real_BT: mx.array | None


_choices: ContextVar[list[WordChoice] | None] = ContextVar("_choices", default=None)


@contextmanager
def observing_words() -> Iterator[list[WordChoice]]:
    """Inside the block every choice by words is added to the list."""
    choices: list[WordChoice] = []
    token = _choices.set(choices)
    try:
        yield choices
    finally:
        _choices.reset(token)


def observe(name: str, signals: Signals, kept: Reduction) -> None:
    """Note a method's choice, where somebody observes and the method reads words."""
    choices = _choices.get()
    if choices is None:
        return
    words_BTN, text_BTD = signals.get("text_attention_BTN"), signals.get("text_BTD")
    if words_BTN is None and text_BTD is not None and text_BTD.shape[-1] == signals.x_BND.shape[-1]:
        with choosing():
            words_BTN = cosine(text_BTD, signals.x_BND)
    if words_BTN is not None:
        mx.eval(words_BTN, kept.arrays)
        choices.append(WordChoice(name, kept, words_BTN, signals.get("text_real_BT")))
