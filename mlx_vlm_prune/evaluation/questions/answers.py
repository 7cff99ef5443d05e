"""What several formats share in judging an answer: exact match, and the letter of an option."""

from . import Question

ONE_WORD = "Answer the question using a single word or phrase."
ONE_LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def normalise(text: str) -> str:
    """Lower case, single spaces, without a final full stop."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def exact(question: Question, said: str) -> float:
    """1 where the answer is, normalised, one of the right ones; else 0."""
    return float(normalise(said) in {normalise(answer) for answer in question.answers})


def options(choices: list[str]) -> str:
    """The choices, a line each: "A. red"."""
    return "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )
