"""A chat's messages as questions and answers in turns, with the places of their pictures."""

from collections.abc import Sequence
from itertools import groupby

from ..inputs.prompt import IMAGE_MARK
from .refusals import Notes, RequestRefusedError
from .request_schema import ImagePart, ImageUrl, Message

SYSTEM = ("system", "developer")
Parts = list[str | ImageUrl]  # of a turn, in their order


def read_turns(
    messages: Sequence[Message], places_pictures: bool, notes: Notes
) -> tuple[list[str], list[tuple[int, ImageUrl]]]:
    """The texts of a conversation and its pictures, each with the number of its text.

    Texts are the system's ("" without one), then questions and answers in turns; messages of one
    role behind each other are one turn. Raises RequestRefusedError for what is no conversation
    that begins and ends with a question.
    """
    turns, system = list[tuple[str, Parts]](), Parts()
    for number, message in enumerate(messages):
        parts = parts_of(message, number)
        if message.role in SYSTEM:
            system += parts
        elif turns and turns[-1][0] == message.role:
            turns[-1][1].extend(parts)
        else:
            turns.append((message.role, parts))
    if not turns or {turns[0][0], turns[-1][0]} != {"user"}:
        raise RequestRefusedError(
            "messages must be questions of the user and answers of the assistant in turns, and"
            " begin and end with a question",
            field="messages",
        )
    all_parts = [system, *(parts for _, parts in turns)]
    texts = [text_of(parts, places_pictures, notes) for parts in all_parts]
    links = [
        (n, part)
        for n, parts in enumerate(all_parts)
        for part in parts
        if isinstance(part, ImageUrl)
    ]
    return texts, links


def parts_of(message: Message, number: int) -> Parts:
    """A message's texts and pictures. Raises RequestRefusedError for a picture that is not the
    user's, and for no content."""
    if message.content is None and message.role != "assistant":
        raise RequestRefusedError(f"messages[{number}] has no content", field="messages")
    content = message.content or ()
    if message.role != "user" and any(isinstance(part, ImagePart) for part in content):
        raise RequestRefusedError(
            f"messages[{number}] of the {message.role} has a picture; only the user's can",
            field="messages",
        )
    return [part.image_url if isinstance(part, ImagePart) else part.text for part in content]


def text_of(parts: Parts, places_pictures: bool, notes: Notes) -> str:
    """All texts of a turn, a line each. Where pictures and texts take turns, marks say where the
    pictures are; else pictures come first, before or behind a text as clients send them.

    A user's own marks are places where there are as many as pictures.
    """
    parts = [part for part in parts if part]
    pictures = sum(isinstance(part, ImageUrl) for part in parts)
    runs = len([*groupby(parts, key=lambda part: isinstance(part, ImageUrl))])
    is_mixed = runs > 2
    marks = sum(part.count(IMAGE_MARK) for part in parts if isinstance(part, str))
    if marks and (is_mixed or marks != pictures or not places_pictures):
        notes.warn(f"the words have {IMAGE_MARK}, which was left out: it marks no picture here")
        parts = [p.replace(IMAGE_MARK, "") if isinstance(p, str) else p for p in parts]
    if is_mixed and places_pictures:
        return "\n".join(part if isinstance(part, str) else IMAGE_MARK for part in parts)
    if is_mixed:
        notes.warn("the model's chat template says where pictures go: they lost their places among"
                   " the texts")  # fmt: skip
    return "\n".join(part for part in parts if isinstance(part, str))
