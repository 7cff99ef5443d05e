"""One conversation about images, and how it becomes token ids of which some are answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..checkpoints.errors import UserError
from ..inputs.processor import Processor
from ..inputs.prompt import IMAGE_MARK, PRIVATE_USE, Prompt, Tokenizer, placeholder_run

Picture = Path | bytes | Callable[[], Image.Image]


@dataclass(frozen=True)
class Example:
    """Turns of user and assistant about some images.

    `<image>` in a question says where an image goes; without any mark images come first.
    `where` names the record in messages.
    """

    images: tuple[Picture, ...]
    turns: tuple[tuple[str, str], ...]  # (question, answer)
    where: str


@dataclass(frozen=True)
class TokenizedExample:
    """Ids with each image's placeholders, and which of them the model learns to say."""

    prompt: Prompt
    is_answer: np.ndarray  # of every id
    was_cut: bool = False  # to the longest that is allowed


def tokenize_example(
    processor: Processor, example: Example, tokens_per_image: int, max_seq_length: int
) -> TokenizedExample:
    """Through the chat template; answers with the token that ends each are what is learned.

    Raises UserError where marks and images differ in number, the template changes an answer, or
    nothing of an answer is left within `max_seq_length` ids.
    """
    tokenizer = processor.tokenizer
    stand_in = _unused_character(tokenizer, example)
    texts = _with_stand_ins(example, stand_in)
    text, spans = render_turns(tokenizer, texts)
    pieces = text.split(stand_in)
    if len(pieces) - 1 != len(example.images):
        raise UserError(f"the chat template of {tokenizer.name} does not keep the user's text")
    starts, expanded, width = [], pieces[0], len(processor.image_token) * tokens_per_image
    for piece in pieces[1:]:
        starts.append(len(expanded))
        expanded += processor.image_token * tokens_per_image + piece
    encoding = tokenizer.encoding(expanded)
    runs = [
        placeholder_run(tokenizer, encoding, start, tokens_per_image, processor.image_token)
        for start in starts
    ]
    is_answer = np.zeros(len(encoding.ids), bool)
    for begin, end in spans:
        begin, end = (at + text.count(stand_in, 0, at) * (width - 1) for at in (begin, end))
        is_answer |= [begin <= first < end and last > first for first, last in encoding.offsets]
    return _cut(Prompt(encoding.ids, runs), is_answer, max_seq_length)


def render_turns(
    tokenizer: Tokenizer, turns: Sequence[tuple[str, str]]
) -> tuple[str, list[tuple[int, int]]]:
    """The whole conversation as text, and where in it the assistant's answers stand.

    An answer begins where a prompt for generation ends, and ends behind its end token.
    """
    messages: list[dict[str, str]] = []
    spans = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        begin = len(tokenizer.render(messages))
        messages.append({"role": "assistant", "content": answer})
        end = len(tokenizer.render(messages, add_generation_prompt=False).rstrip())
        spans.append((begin, end))
    text = tokenizer.render(messages, add_generation_prompt=False)
    bos = tokenizer.missing_bos(text)
    for (begin, end), (_, answer) in zip(spans, turns, strict=True):
        if answer.strip() not in text[begin:end]:
            raise UserError(f"the chat template of {tokenizer.name} does not keep an answer's text")
    return bos + text, [(begin + len(bos), end + len(bos)) for begin, end in spans]


def _unused_character(tokenizer: Tokenizer, example: Example) -> str:
    used = (tokenizer.chat_template or "") + "".join(map("".join, example.turns))
    return next(chr(c) for c in PRIVATE_USE if chr(c) not in used)


def _with_stand_ins(example: Example, stand_in: str) -> list[tuple[str, str]]:
    """The turns with one character for each image."""
    marks = sum(question.count(IMAGE_MARK) for question, _ in example.turns)
    images = len(example.images)
    turns = list(example.turns)
    if not marks:
        (question, answer), *rest = turns
        turns = [((IMAGE_MARK + "\n") * images + question, answer), *rest]
    elif marks != images:
        raise UserError(f"it has {marks} {IMAGE_MARK} marks but {images} images")
    return [(question.replace(IMAGE_MARK, stand_in), answer) for question, answer in turns]


def _cut(prompt: Prompt, is_answer: np.ndarray, max_seq_length: int) -> TokenizedExample:
    """To the longest that is allowed; no image is cut."""
    was_cut = len(prompt.ids) > max_seq_length
    if was_cut:
        prompt = Prompt(prompt.ids[:max_seq_length], prompt.runs)
        is_answer = is_answer[:max_seq_length]
    ends_inside = all(start + length <= len(prompt.ids) for start, length in prompt.runs)
    if not ends_inside or not is_answer.any():
        raise UserError(f"none of its answers stands within max_seq_length={max_seq_length} tokens")
    return TokenizedExample(prompt, is_answer, was_cut)
