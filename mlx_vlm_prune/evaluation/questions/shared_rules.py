"""Prompt suffixes and scoring rules that several formats share: exact match, options by letter."""

from . import Question

ONE_WORD = "Answer the question using a single word or phrase."
ONE_LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def normalise(text: str) -> str:
    """Lower case, single spaces, without a final full stop."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def exact_match(question: Question, response: str) -> float:
    """1 where the normalised response is one of the normalised right answers, else 0."""
    return float(normalise(response) in {normalise(answer) for answer in question.answers})


def lettered_options(choices: list[str]) -> str:
    """The choices, a line each: "A. red"."""
    return "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )
