"""Data in LLaVA's format (arXiv:2304.08485): a JSON list of conversations about an image each.

    [{"id": "1", "image": "a.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}]

Every human turn becomes a question, and the gpt turn after it is its answer. Questions stand
alone: earlier turns are not given, so one that leans on them ("and its colour?") is harder
here than it was there. Records without an image are left out.

The format has no rule for judging. Ours: the answer is right when it is the given one, but
for case, white space and a final full stop. For long answers that says little; their
log-probability says more.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import Bad, Question, Source
from .answers import exact as score
from .reading import NOTHING, Fault, each_entry, image_file, optional, text_of, whole_json

__all__ = ["pairs", "questions", "read", "score"]

MARK = "<image>"


def read(source: Source, bad: Bad) -> Iterator[Question]:
    """The questions of a JSON file. Raises UserError where it or the images' folder is missing."""
    return each_entry(source, bad, whole_json(source.path, list), _questions)


def _questions(number: str, record: dict[str, Any], home: Path) -> Iterable[Question]:
    if "image" not in record:
        return NOTHING
    image = image_file(home, text_of(record, "image"))
    asked = pairs(record.get("conversations"), "from", "value", ("human", "gpt"))
    return questions(optional(record, "id", number), asked, image)


def questions(name: str, asked: list[tuple[str, str]], image: Path | bytes) -> Iterator[Question]:
    """The turns (question, answer) of a conversation about an image, numbered if several."""
    return (
        Question(f"{name}-{turn}" if len(asked) > 1 else name, text, (answer,), image)
        for turn, (text, answer) in enumerate(asked, 1)
    )


def pairs(turns: Any, who: str, what: str, names: tuple[str, str]) -> list[tuple[str, str]]:
    """(question, answer) of a conversation, without the marks where the image stood.

    `who` and `what` are the keys of a turn's speaker and words, `names` the two speakers.
    Turns of others, such as a system prompt, are passed over. Raises Fault.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Fault("conversations is not a list of turns")
    spoken = [turn for turn in turns if turn.get(who) in names]
    if not spoken:
        raise Fault(f"nobody says anything (a turn's {who} is {names[0]} or {names[1]})")
    if len(spoken) % 2 or any(turn[who] != names[n % 2] for n, turn in enumerate(spoken)):
        raise Fault(f"turns of {names[0]} and {names[1]} do not alternate")
    said = [text_of(turn, what).replace(MARK, "").strip() for turn in spoken]
    if not all(said):
        raise Fault(f"a turn holds nothing but {MARK}")
    return list(zip(said[::2], said[1::2], strict=True))
