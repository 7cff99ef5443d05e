"""Several turns as messages of a chat template, and as the prompt for the next answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoints.errors import UserError
from .prompt import (
    Prompt,
    Tokenizer,
    place_images,
    split_at_images,
    tokenize_prompt,
    unused_character,
)

Message = dict[str, Any]
END_OF_THINK = "</think>"


@dataclass(frozen=True)
class Turn:
    """A question that was answered, and how many images came with it."""

    question: str
    images: int
    answer: str


def tokenize_conversation(
    tokenizer: Tokenizer,
    history: Sequence[Turn],
    question: str,
    tokens_per_image: Sequence[int],
    image_token: str,
    options: Mapping[str, Any] | None = None,
    system: str | None = None,
) -> Prompt:
    """A question after a system message and earlier turns as ids; without these, as
    `tokenize_prompt` has it.

    `tokens_per_image` is of all images, those of earlier turns first. An answer whose end the
    template does not mark ends with the tokenizer's token for it. Raises UserError, as there.
    """
    if not history and system is None:
        return tokenize_prompt(tokenizer, question, tokens_per_image, image_token, True, options)
    questions = [*(turn.question for turn in history), question]
    counts = [turn.images for turn in history]
    counts.append(len(tokens_per_image) - sum(counts))
    answers = [turn.answer.strip() for turn in history]
    stand_in = unused_character(tokenizer.chat_template or "", system or "", *questions, *answers)
    pairs = zip(questions, counts, strict=True)
    contents = [stand_in.join(split_at_images(text, images)) for text, images in pairs]
    texts = (
        [("user", contents[0])] if system is None else [("system", system), ("user", contents[0])]
    )
    for answer, content in zip(answers, contents[1:], strict=True):
        texts += [("assistant", answer), ("user", content)]
    messages = build_messages(tokenizer, texts)
    if history and (end := _missing_end(tokenizer, messages, stand_in)):
        ended = [(role, text + end if role == "assistant" else text) for role, text in texts]
        messages = build_messages(tokenizer, ended)
    text = tokenizer.render(messages, **(options or {}))
    text = tokenizer.missing_bos(text) + text
    return place_images(tokenizer, text, stand_in, tokens_per_image, image_token)


def _missing_end(tokenizer: Tokenizer, messages: list[Message], stand_in: str) -> str:
    """What ends an answer where the template writes nothing behind it."""
    question = next(message for message in messages if message["role"] == "user")
    answer = make_message("assistant", stand_in, not isinstance(question["content"], str))
    behind = render_messages(tokenizer, [question, answer]).rpartition(stand_in)[2]
    return "" if behind.strip() else tokenizer.special_tokens.get("eos_token") or ""


def build_messages(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> list[Message]:
    """(role, text) as the template takes them: as texts, or in parts where it drops texts, as
    LLaVA's does. Raises UserError where it drops both."""
    for in_parts in (False, True):
        messages = [make_message(role, text, in_parts) for role, text in texts]
        if _keeps(tokenizer, messages):
            return messages
    raise UserError(
        f"the chat template of {tokenizer.name} does not keep the text of every turn"
        f" ({', '.join(dict.fromkeys(role for role, _ in texts))})"
    )


def make_message(role: str, text: str, in_parts: bool) -> Message:
    return {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}


def message_text(message: Message) -> str:
    content = message["content"]
    return str(content if isinstance(content, str) else content[0]["text"])


def render_messages(tokenizer: Tokenizer, messages: list[Message]) -> str:
    return tokenizer.render(messages, add_generation_prompt=False)


def split_thoughts(answer: str) -> tuple[str, str]:
    """The thoughts before an answer, and the answer itself."""
    thoughts, mark, visible = answer.rpartition(END_OF_THINK)
    return (thoughts + mark, visible.lstrip("\n")) if visible.strip() else ("", answer)


def _keeps(tokenizer: Tokenizer, messages: list[Message]) -> bool:
    """Does the template write every turn's text, in their order?"""
    rendered, cursor = render_messages(tokenizer, messages), 0
    for message in messages:
        visible = split_thoughts(message_text(message))[1].strip()
        place = rendered.find(visible, cursor)
        if place < 0:
            return False
        cursor = place + len(visible)
    return True
