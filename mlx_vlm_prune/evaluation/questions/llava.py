"""Data in LLaVA's format (arXiv:2304.08485): a JSON list of conversations about an image each.

    [{"id": "1", "image": "a.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}]

Every human turn becomes a question, and the gpt turn after it is its answer. Earlier turns are not
given, so a question that refers to them ("and its colour?") is harder here. Records without an
image are left out.

The format has no published scoring rule. Ours: a response is right when it equals the answer,
except for case, white space and a final full stop. For long answers the log-probability says more.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import BadRecords, Question, Source
from .records import (
    NO_QUESTIONS,
    RecordError,
    image_file,
    load_json,
    optional_field,
    questions_from_json,
    text_field,
)
from .shared_rules import exact_match as score

__all__ = ["question_answer_pairs", "read", "score", "turn_questions"]

IMAGE_MARK = "<image>"


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a JSON file. Raises UserError where it or the images' folder is missing."""
    return questions_from_json(source, bad, load_json(source.path, list), _questions)


def _questions(number: str, record: dict[str, Any], images: Path) -> Iterable[Question]:
    if "image" not in record:
        return NO_QUESTIONS
    image = image_file(images, text_field(record, "image"))
    turns = record.get("conversations")
    pairs = question_answer_pairs(turns, "from", "value", ("human", "gpt"))
    return turn_questions(optional_field(record, "id", number), pairs, image)


def turn_questions(
    record_id: str, pairs: list[tuple[str, str]], image: Path | bytes
) -> Iterator[Question]:
    """A question for each (question, answer) about an image; their ids are numbered if several."""
    return (
        Question(f"{record_id}-{turn}" if len(pairs) > 1 else record_id, text, (answer,), image)
        for turn, (text, answer) in enumerate(pairs, 1)
    )


def question_answer_pairs(
    turns: Any, speaker_key: str, text_key: str, speakers: tuple[str, str]
) -> list[tuple[str, str]]:
    """The (question, answer) pairs of a conversation, without its image marks.

    `speakers` are who asks and who answers. Turns of others, such as a system prompt, are left
    out. Raises RecordError.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RecordError("conversations is not a list of turns")
    asker, answerer = speakers
    dialogue = [turn for turn in turns if turn.get(speaker_key) in speakers]
    if not dialogue:
        raise RecordError(f"no turn can be used (a turn's {speaker_key} is {asker} or {answerer})")
    in_turns = all(turn[speaker_key] == speakers[n % 2] for n, turn in enumerate(dialogue))
    if len(dialogue) % 2 or not in_turns:
        raise RecordError(f"turns of {asker} and {answerer} do not alternate")
    texts = [text_field(turn, text_key).replace(IMAGE_MARK, "").strip() for turn in dialogue]
    if not all(texts):
        raise RecordError(f"a turn holds nothing but {IMAGE_MARK}")
    return list(zip(texts[::2], texts[1::2], strict=True))
