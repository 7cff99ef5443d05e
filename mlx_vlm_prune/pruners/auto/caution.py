"""More tokens for prompts that ask for counting, reading or places, which lose most by pruning."""

import re
from dataclasses import dataclass

from .reasons import CAUTIOUS, FACTOR, MOST_SHARE, Cautious


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
    prompt: str, keep_ratio: float | None, keep_tokens: int | None, N: int | None
) -> KeptMore | None:
    """FACTOR times as much of an image's N tokens, up to a share of MOST_SHARE of them, where a
    prompt asks for what loses most; None where nothing is to change.

    Without N, where images differ in their tokens, a number is multiplied alone.
    """
    subject = subject_of(prompt)
    if subject is None:
        return None
    (line, words), raised_tokens = subject, None
    if keep_ratio is not None:
        raised_ratio = max(keep_ratio, min(MOST_SHARE, FACTOR * keep_ratio))
        raised, kept = f"{raised_ratio:.4g}", f"{keep_ratio:.4g}"
    else:
        assert keep_tokens is not None, "one of the two is given"
        most = FACTOR * keep_tokens if N is None else int(MOST_SHARE * N)
        raised_ratio, raised_tokens = None, max(keep_tokens, min(most, FACTOR * keep_tokens))
        raised, kept = f"{raised_tokens}", f"{keep_tokens}"
    if raised == kept:
        return None
    note = (
        f"the prompt asks for {line.subject} ({words!r}), so {raised} of the tokens stay in place"
        f" of {kept}; --no-caution keeps {kept}"
    )
    return KeptMore(raised_ratio, raised_tokens, note)
