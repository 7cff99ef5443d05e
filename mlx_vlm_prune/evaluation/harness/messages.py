"""A task's messages as a prompt with its pictures, its system message and the turns before it."""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...checkpoints.errors import UserError, short
from ...inputs.image_sources import ImageSource
from ...inputs.messages import Turn
from ...inputs.prompt import IMAGE_MARK

logger = logging.getLogger("mlx_vlm_prune")
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


@dataclass(frozen=True)
class TaskPrompt:
    """What a task shows a model: texts as they are in the task, pictures in their order."""

    text: str
    images: list[ImageSource]
    system: str | None = None
    history: tuple[Turn, ...] = ()


def read_messages(messages: Any, places_images: bool) -> TaskPrompt:
    """The prompt of a conversation that ends in a question of the user's.

    Pictures between texts are marked by `<image>` where the model takes such marks
    (`places_images`); where mlx-vlm's template places them, their place among the texts is lost,
    and a warning says so once. So it is with marks in the texts themselves: see `read_text`. Raises
    UserError for what is no such conversation, and for videos and sounds.
    """
    turns = [_role_and_parts(message) for message in _listed(messages, "messages")]
    system = [_text_alone(parts) for role, parts in turns if role == SYSTEM]
    talk = [(role, parts) for role, parts in turns if role != SYSTEM]
    roles = [role for role, _ in talk]
    is_in_turns = roles == [USER, ASSISTANT] * (len(roles) // 2) + [USER] * (len(roles) % 2)
    if not is_in_turns or len(roles) % 2 == 0:
        raise UserError(
            f"its messages are from {', '.join(roles) or 'nobody'}; they must be the user's and the"
            " assistant's in turns, and end with the user's"
        )
    questions = [_question(parts, places_images) for _, parts in talk[::2]]
    answers = [_text_alone(parts) for _, parts in talk[1::2]]
    history = [
        Turn(text, len(images), answer)
        for (text, images), answer in zip(questions, answers, strict=False)
    ]
    images = [image for _, pictures in questions for image in pictures]
    return TaskPrompt(questions[-1][0], images, "\n".join(system) or None, tuple(history))


def _listed(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise UserError(f"its {name} are {short(value)}; they must be a list")
    return value


def _role_and_parts(message: Any) -> tuple[str, list[Any]]:
    """Who says it, and its texts (str) and pictures. Raises UserError."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in (SYSTEM, USER, ASSISTANT):
        raise UserError(
            f"a message is {short(message)}; its role must be system, user or assistant"
        )
    content = message.get("content")
    if isinstance(content, str):
        return role, [(True, content)]
    return role, [_part(part) for part in _listed(content, "message's parts")]


def _part(part: Any) -> tuple[bool, Any]:
    """Is it a text? and the text or the picture. Raises UserError."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return True, part["text"]
    if kind == "image" and part.get("url") is not None:
        return False, part["url"]
    if kind in ("video", "audio"):
        raise UserError(f"it shows a part of type {kind}; these models read texts and images alone")
    raise UserError(f"a part of a message is {short(part)}; it must be a text or an image")


def _text_alone(parts: Sequence[tuple[bool, Any]]) -> str:
    if not all(is_text for is_text, _ in parts):
        raise UserError("an image is in a message that is not the user's")
    return read_text("".join(text for _, text in parts), 0, places_images=False)


def read_text(text: str, images: int, places_images: bool) -> str:
    """A task's text about so many pictures that come before it.

    Where the model takes marks, as many `<image>` as pictures say where these stand. Other marks
    are left out, and a warning says so once.
    """
    marks = text.count(IMAGE_MARK)
    if not marks or (places_images and marks == images):
        return text
    _warn_of_marks()
    return text.replace(IMAGE_MARK, "")


def _question(
    parts: Sequence[tuple[bool, Any]], places_images: bool
) -> tuple[str, list[ImageSource]]:
    """The text of a turn of the user's, and its pictures."""
    images = [source for is_text, source in parts if not is_text]
    kinds = [is_text for is_text, _ in parts]
    if kinds == sorted(kinds):  # pictures come first
        text = "".join(content for is_text, content in parts if is_text)
        return read_text(text, len(images), places_images), images
    if not places_images:
        _warn_of_order()
    mark = IMAGE_MARK if places_images else ""
    texts = [
        read_text(content, 0, places_images) if is_text else mark for is_text, content in parts
    ]
    return "".join(texts), images


@functools.cache
def _warn_of_order() -> None:
    """Once."""
    logger.warning(
        "this task has pictures between its texts; mlx-vlm's chat template places them ahead of the"
        " texts, or behind"
    )


@functools.cache
def _warn_of_marks() -> None:
    """Once."""
    logger.warning(
        "this task's texts have %s where no picture can be placed by it; it is left out",
        IMAGE_MARK,
    )
