"""A conversation through a chat template: its text, and where in it the answers stand.

An answer begins where the prompt for it would end when the model is asked, so that whatever the
template puts there (an empty <think> block) is read and never learned. It ends behind the token
that ends it. A template without such a token (LLaVA's at Hugging Face) gets the tokenizer's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoints.errors import UserError
from ..inputs.prompt import PRIVATE_USE, Tokenizer

Message = dict[str, Any]
Span = tuple[int, int]
THINK, END_OF_THINK = "<think>", "</think>"
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
    messages = _messages(tokenizer, turns, system)
    pieces = _around_answers(tokenizer, messages)
    end_mark = _end_mark(tokenizer, pieces[-1])
    rendered = text = pieces[0]  # as the template has it, and as it is returned
    spans = list[Span]()
    for n, ((_, answer), piece) in enumerate(zip(turns, pieces[1:], strict=True)):
        history = messages[: len(messages) - 2 * (len(turns) - n) + 1]
        begin, missing = _answer_begin(tokenizer, history, rendered, answer, options or {})
        begin += len(text) - len(rendered) + len(missing)
        visible = _split_thoughts(answer)[1]
        end = "" if piece.startswith(end_mark) else end_mark
        rendered += visible + piece
        text += missing + visible + end
        spans.append((begin, len(text) + (0 if end else len(end_mark))))
        text += piece
    if rendered != _render(tokenizer, messages):
        raise UserError(f"the chat template of {tokenizer.name} does not keep an answer's text")
    bos = tokenizer.missing_bos(text)
    return bos + text, [(begin + len(bos), end + len(bos)) for begin, end in spans]


def unused_character(*texts: str) -> str:
    """A character without a meaning that none of the texts has."""
    used = set("".join(texts))
    return next(chr(c) for c in PRIVATE_USE if chr(c) not in used)


def _messages(tokenizer: Tokenizer, turns: Sequence[tuple[str, str]], system: str) -> list[Message]:
    """As the template takes them: as texts, or in parts where it drops texts, as LLaVA's does."""
    texts = [("system", system)] if system else []
    for question, answer in turns:
        texts += [("user", question), ("assistant", answer)]
    for in_parts in (False, True):
        messages = [_message(role, text, in_parts) for role, text in texts]
        if _keeps(tokenizer, messages):
            return messages
    raise UserError(
        f"the chat template of {tokenizer.name} does not keep the text of every turn"
        f" ({', '.join(dict.fromkeys(role for role, _ in texts))})"
    )


def _keeps(tokenizer: Tokenizer, messages: list[Message]) -> bool:
    """Does the template write every turn's text, in their order?"""
    rendered, cursor = _render(tokenizer, messages), 0
    for message in messages:
        visible = _split_thoughts(_text(message))[1].strip()
        place = rendered.find(visible, cursor)
        if place < 0:
            return False
        cursor = place + len(visible)
    return True


def _render(tokenizer: Tokenizer, messages: list[Message]) -> str:
    return tokenizer.render(messages, add_generation_prompt=False)


def _split_thoughts(answer: str) -> tuple[str, str]:
    """The thoughts before an answer, and the answer itself."""
    thoughts, mark, visible = answer.rpartition(END_OF_THINK)
    return (thoughts + mark, visible.lstrip("\n")) if visible.strip() else ("", answer)


def _around_answers(tokenizer: Tokenizer, messages: list[Message]) -> list[str]:
    """The text before, between and after the answers, without their thoughts."""
    stand_in = unused_character(tokenizer.chat_template or "", *map(_text, messages))
    replaced = list[Message]()
    for message in messages:
        if message["role"] == "assistant":
            text = _text(message)
            text = text.removesuffix(_split_thoughts(text)[1]) + stand_in
            in_parts = not isinstance(message["content"], str)
            message = _message("assistant", text, in_parts)
        replaced.append(message)
    pieces = _render(tokenizer, replaced).split(stand_in)
    if len(pieces) != 1 + sum(message["role"] == "assistant" for message in messages):
        raise UserError(f"the chat template of {tokenizer.name} does not keep an answer's text")
    return pieces


def _message(role: str, text: str, in_parts: bool) -> Message:
    return {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}


def _text(message: Message) -> str:
    content = message["content"]
    return str(content if isinstance(content, str) else content[0]["text"])


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
    thinks = bool(_split_thoughts(answer)[0])
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
