"""More tokens for what loses most by pruning: counting, reading and places, and documents."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from .document import is_document
from .reasons import CAUTIOUS, FACTOR, MOST_SHARE, Cautious

Pictures = Callable[[], Sequence[Image.Image]]


def _cause(prompt: str, pictures: Pictures) -> str | None:
    """Why more is to stay, in half a sentence."""
    if subject := subject_of(prompt):
        return f"the prompt asks for {subject[0].subject} ({subject[1]!r})"
    return "a picture is a document" if any(map(is_document, pictures())) else None


@dataclass(frozen=True)
class KeptMore:
    """A budget that a prompt has raised, and the words of it for why."""

    keep_ratio: float | None
    keep_tokens: int | None
    note: str


def subject_of(prompt: str) -> tuple[Cautious, str] | None:
    """What a prompt asks for that loses most by pruning, and its words that say so; None else."""
    text = prompt.lower()
    for line in CAUTIOUS:
        # Chinese has no spaces, so its words are looked for inside others.
        patterns = (rf"\b{word}\b" if word.isascii() else word for word in line.words)
        if match := re.search("|".join(patterns), text):
            return line, match[0]
    return None


def cautious(
    prompt: str, keep_ratio: float | None, keep_tokens: int | None, N: int | None,
    pictures: Pictures = tuple,
) -> KeptMore | None:  # fmt: skip
    """FACTOR times as much of an image's N tokens, up to a share of MOST_SHARE of them, where a
    prompt asks for what loses most, or a picture is a document; None where nothing is to change.

    `pictures` is called where the prompt does not decide. Without N, where images differ in their
    tokens, a number is multiplied alone.
    """
    raised_tokens = None
    if keep_ratio is not None:
        raised_ratio = max(keep_ratio, min(MOST_SHARE, FACTOR * keep_ratio))
        raised, kept = f"{raised_ratio:.4g}", f"{keep_ratio:.4g}"
    else:
        assert keep_tokens is not None, "one of the two is given"
        most = FACTOR * keep_tokens if N is None else int(MOST_SHARE * N)
        raised_ratio, raised_tokens = None, max(keep_tokens, min(most, FACTOR * keep_tokens))
        raised, kept = f"{raised_tokens}", f"{keep_tokens}"
    cause = None if raised == kept else _cause(prompt, pictures)
    if cause is None:
        return None
    note = f"{cause}, so {raised} of the tokens stay in place of {kept}; --no-caution keeps {kept}"
    return KeptMore(raised_ratio, raised_tokens, note)
