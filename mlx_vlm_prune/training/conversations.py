"""A conversation through a chat template: its text, and where in it the answers stand.

An answer begins where the prompt for it would end when the model is asked, so that whatever the
template puts there (an empty <think> block) is read and never learned. It ends behind the token
that ends it. A template without such a token (LLaVA's at Hugging Face) gets the tokenizer's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoints.errors import UserError
from ..inputs.messages import (
    END_OF_THINK,
    Message,
    build_messages,
    make_message,
    message_text,
    render_messages,
    split_thoughts,
)
from ..inputs.prompt import Tokenizer, unused_character

Span = tuple[int, int]
THINK = "<think>"
# Prompts for an answer that thinks first, in MiniMind-3's templates and in Qwen's.
THINKING: tuple[Mapping[str, Any], ...] = ({"open_thinking": True}, {"enable_thinking": True})


def render_turns(
    tokenizer: Tokenizer,
    turns: Sequence[tuple[str, str]],
    system: str = "",
    options: Mapping[str, Any] | None = None,
) -> tuple[str, list[Span]]:
    """The text of a conversation, and the (begin, end) of each answer in it.

    `options` are the template's own, as in `generate`. Raises UserError where the template changes
    an answer's text, or asks for it by other words than stand before it.
    """
    texts = [("system", system)] if system else []
    for question, answer in turns:
        texts += [("user", question), ("assistant", answer)]
    messages = build_messages(tokenizer, texts)
    pieces = _around_answers(tokenizer, messages)
    end_mark = _end_mark(tokenizer, pieces[-1])
    rendered = text = pieces[0]  # as the template has it, and as it is returned
    spans = list[Span]()
    for n, ((_, answer), piece) in enumerate(zip(turns, pieces[1:], strict=True)):
        history = messages[: len(messages) - 2 * (len(turns) - n) + 1]
        begin, missing = _answer_begin(tokenizer, history, rendered, answer, options or {})
        begin += len(text) - len(rendered) + len(missing)
        visible = split_thoughts(answer)[1]
        end = "" if piece.startswith(end_mark) else end_mark
        rendered += visible + piece
        text += missing + visible + end
        spans.append((begin, len(text) + (0 if end else len(end_mark))))
        text += piece
    if rendered != render_messages(tokenizer, messages):
        raise UserError(f"the chat template of {tokenizer.name} does not keep an answer's text")
    bos = tokenizer.missing_bos(text)
    return bos + text, [(begin + len(bos), end + len(bos)) for begin, end in spans]


def _around_answers(tokenizer: Tokenizer, messages: list[Message]) -> list[str]:
    """The text before, between and after the answers, without their thoughts."""
    stand_in = unused_character(tokenizer.chat_template or "", *map(message_text, messages))
    replaced = list[Message]()
    for message in messages:
        if message["role"] == "assistant":
            text = message_text(message)
            text = text.removesuffix(split_thoughts(text)[1]) + stand_in
            in_parts = not isinstance(message["content"], str)
            message = make_message("assistant", text, in_parts)
        replaced.append(message)
    pieces = render_messages(tokenizer, replaced).split(stand_in)
    if len(pieces) != 1 + sum(message["role"] == "assistant" for message in messages):
        raise UserError(f"the chat template of {tokenizer.name} does not keep an answer's text")
    return pieces


def _end_mark(tokenizer: Tokenizer, piece: str) -> str:
    """What ends an answer: what the template writes behind the last one, or else the tokenizer's
    token for it."""
    return piece.rstrip() or tokenizer.special_tokens.get("eos_token") or ""


def _answer_begin(
    tokenizer: Tokenizer, history: list[Message], rendered: str, answer: str,
    options: Mapping[str, Any],
) -> tuple[int, str]:  # fmt: skip
    """Where the prompt for an answer ends in `rendered`, the text before the answer, and what that
    prompt has besides."""
    thinks = bool(split_thoughts(answer)[0])
    for more in ({}, *(THINKING if thinks else ())):
        prompt = tokenizer.render(history, **{**options, **more})
        if rendered.startswith(prompt):
            return len(prompt), ""
        is_closed = prompt.count(THINK) == prompt.count(END_OF_THINK)
        if prompt.startswith(rendered) and is_closed and not thinks:
            return len(rendered), prompt[len(rendered) :]
    raise UserError(
        f"the chat template of {tokenizer.name} asks for an answer by"
        f" {prompt[-60:]!r}, which does not stand before this one; the template's options"
        " (chat_template_config) may change that"
    )
