"""A chat's messages as questions and answers in turns, with the places of their pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from ..inputs.prompt import IMAGE_MARK
from .refusals import Notes, RequestRefusedError
from .request_schema import ImageUrl, Message, TextPart, VideoUrl, link_of

SYSTEM = ("system", "developer")
Parts = list[str | ImageUrl | VideoUrl]  # of a turn, in their order
Link = TypeVar("Link", ImageUrl, VideoUrl)


@dataclass(frozen=True)
class ReadTurns:
    """The texts of a conversation: the system's ("" without one), then questions and answers in
    turns; its pictures, each with the number of its text; and the clip that it is about."""

    texts: list[str]
    pictures: list[tuple[int, ImageUrl]]
    clip: VideoUrl | None


def read_turns(messages: Sequence[Message], places_pictures: bool, notes: Notes) -> ReadTurns:
    """A conversation's texts, pictures and clip; messages of one role behind each other are one
    turn. Raises RequestRefusedError for what is no conversation that begins and ends with a
    question, and for a clip that is not the first question's or not alone.
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
    clip = clip_of(all_parts)
    texts = [text_of(parts, places_pictures, notes) for parts in all_parts]
    return ReadTurns(texts, links_of(all_parts, ImageUrl), clip)


def links_of(all_parts: Sequence[Parts], kind: type[Link]) -> list[tuple[int, Link]]:
    """All pictures, or all clips, each with the number of its text."""
    return [
        (n, part) for n, parts in enumerate(all_parts) for part in parts if isinstance(part, kind)
    ]


def clip_of(all_parts: Sequence[Parts]) -> VideoUrl | None:
    """The clip of a conversation, whose first text is the system's; its place among the words is
    the chat template's. Raises RequestRefusedError for one that cannot be read."""
    clips = links_of(all_parts, VideoUrl)
    if not clips:
        return None
    if links_of(all_parts, ImageUrl):
        raise RequestRefusedError(
            "a chat is about a video or about pictures; leave out one of them", field="messages"
        )
    number, clip = clips[0]
    if number != 1:
        raise RequestRefusedError(
            "the video must come with the first question; all later ones are about it, too",
            field="messages",
        )
    return clip


def parts_of(message: Message, number: int) -> Parts:
    """A message's texts, pictures and clips. Raises RequestRefusedError for one that is not
    the user's, and for no content."""
    if message.content is None and message.role != "assistant":
        raise RequestRefusedError(f"messages[{number}] has no content", field="messages")
    content = message.content or ()
    if message.role != "user" and not all(isinstance(part, TextPart) for part in content):
        raise RequestRefusedError(
            f"messages[{number}] of the {message.role} has a picture or a video; only the user's"
            " can",
            field="messages",
        )
    return [part.text if isinstance(part, TextPart) else link_of(part) for part in content]


def text_of(parts: Parts, places_pictures: bool, notes: Notes) -> str:
    """All texts of a turn, a line each. Where pictures and texts take turns, marks say where the
    pictures are; else pictures come first, before or behind a text as clients send them.

    A user's own marks are places where there are as many as pictures.
    """
    parts = [part for part in parts if part]
    is_mixed = len([*groupby(parts, key=lambda part: isinstance(part, str))]) > 2
    parts = [part for part in parts if not isinstance(part, VideoUrl)]
    pictures = sum(isinstance(part, ImageUrl) for part in parts)
    marks = sum(part.count(IMAGE_MARK) for part in parts if isinstance(part, str))
    if marks and (is_mixed or marks != pictures or not places_pictures):
        notes.warn(f"the words have {IMAGE_MARK}, which was left out: it marks no picture here")
        parts = [p.replace(IMAGE_MARK, "") if isinstance(p, str) else p for p in parts]
    if is_mixed and places_pictures:
        return "\n".join(part if isinstance(part, str) else IMAGE_MARK for part in parts)
    if is_mixed:
        notes.warn("the model's chat template says where pictures and videos go: they lost their"
                   " places among the texts")  # fmt: skip
    return "\n".join(part for part in parts if isinstance(part, str))
