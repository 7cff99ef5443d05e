"""One conversation about images, and how it becomes token ids of which some are answers."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..checkpoints.errors import UserError
from ..inputs.processor import Processor
from ..inputs.prompt import IMAGE_MARK, Prompt, Tokenizer, placeholder_run
from .conversations import Span, render_turns, unused_character

Picture = Path | bytes | Callable[[], Image.Image]


@dataclass(frozen=True)
class Example:
    """Turns of user and assistant about some images, or about none.

    `<image>` in a question says where an image goes; without any mark images come first.
    `where` names the record in messages.
    """

    images: tuple[Picture, ...]
    turns: tuple[tuple[str, str], ...]  # (question, answer)
    where: str
    system: str = ""  # what stands before all turns


@dataclass(frozen=True)
class TokenizedExample:
    """Ids with each image's placeholders, and which of them the model learns to say.

    Where it was cut, the prompt may have fewer images than the example.
    """

    prompt: Prompt
    is_answer: np.ndarray  # of every id
    was_cut: bool = False  # to the longest that is allowed


def tokenize_example(
    processor: Processor,
    example: Example,
    tokens_per_image: int,
    max_seq_length: int,
    options: Mapping[str, Any] | None = None,
) -> TokenizedExample:
    """Through the chat template; answers with the token that ends each are what is learned.

    Up to every answer the ids are those of the prompt by which the model is asked for it.
    `options` are the template's own. Raises UserError where marks and images differ in number, the
    template changes an answer, or nothing of an answer is left within `max_seq_length` ids.
    """
    tokenizer, image_token = processor.tokenizer, processor.image_token
    words = [text for turn in example.turns for text in turn]
    stand_in = unused_character(tokenizer.chat_template or "", example.system, *words)
    turns = _with_stand_ins(example, stand_in)
    _check_words(image_token, [example.system or "", *(text for turn in turns for text in turn)])
    text, spans = render_turns(tokenizer, turns, example.system, options)
    if text.count(stand_in) != len(example.images):
        raise UserError(f"the chat template of {tokenizer.name} does not keep the user's text")
    placeholders = image_token * tokens_per_image

    def expanded(place: int) -> int:
        """Where a character of the text stands once every image has its placeholders."""
        return place + text.count(stand_in, 0, place) * (len(placeholders) - 1)

    starts = [expanded(i) for i, letter in enumerate(text) if letter == stand_in]
    spans = [(expanded(begin), expanded(end)) for begin, end in spans]
    text = text.replace(stand_in, placeholders)
    ids, offsets = encode_up_to_answers(tokenizer, text, [begin for begin, _ in spans])
    runs = [
        placeholder_run(tokenizer, ids, offsets, start, tokens_per_image, image_token)
        for start in starts
    ]
    is_answer = np.zeros(len(ids), bool)
    for begin, end in spans:
        is_answer[bisect_left(offsets, (begin,)) : bisect_left(offsets, (end,))] = True
    return cut_to(Prompt(ids, runs), is_answer, max_seq_length)


def _check_words(image_token: str, texts: Sequence[str]) -> None:
    """UserError where a text holds the model's image token, which is longer than a letter."""
    if len(image_token) > 1 and any(image_token in text for text in texts):
        raise UserError(f"its text holds {image_token}, which stands for a picture")


def encode_up_to_answers(
    tokenizer: Tokenizer, text: str, begins: Sequence[int]
) -> tuple[list[int], list[Span]]:
    """Ids of a text with the characters each came from.

    Up to each of the answers, which begin at `begins`, they are those of the text up to there:
    in one piece, white space before an answer could become other ids than in a prompt.
    """
    ids, offsets, begin = list[int](), list[Span](), 0
    for end in [*begins, len(text)]:
        encoding = tokenizer.encoding(text[:end])
        spans = encoding.offsets
        first, shift = bisect_left(spans, (begin,)), 0
        if first and spans[first - 1][1] > begin:  # an id of both
            encoding, first, shift = tokenizer.encoding(text[begin:end]), 0, begin
            spans = encoding.offsets
        ids += encoding.ids[first:]
        offsets += [(a + shift, b + shift) for a, b in spans[first:]]
        begin = end
    return ids, offsets


def _with_stand_ins(example: Example, stand_in: str) -> list[tuple[str, str]]:
    """The turns with one character for each image."""
    turns = list(example.turns)
    if not turns:
        raise UserError("it has no turns")
    if not count_marks(example):
        (question, answer), *rest = turns
        turns = [((IMAGE_MARK + "\n") * len(example.images) + question, answer), *rest]
    return [(question.replace(IMAGE_MARK, stand_in), answer) for question, answer in turns]


def count_marks(example: Example) -> int:
    """The marks of images in the questions.

    Raises UserError where there are some, and not as many as images.
    """
    marks = sum(question.count(IMAGE_MARK) for question, _ in example.turns)
    images = len(example.images)
    if marks and marks != images:
        raise UserError(
            f"it has {marks} {IMAGE_MARK} mark{'s' * (marks != 1)} but {images or 'no'}"
            f" image{'s' * (images != 1)}"
        )
    return marks


def cut_to(prompt: Prompt, is_answer: np.ndarray, max_seq_length: int) -> TokenizedExample:
    """To the longest that is allowed, ahead of an image that would not be whole."""
    length = len(prompt.ids)
    if length <= max_seq_length:
        return TokenizedExample(prompt, is_answer)
    runs = [run for run in prompt.runs if sum(run) <= max_seq_length]
    end = min([max_seq_length, *(start for start, _ in prompt.runs[len(runs) :])])
    if not is_answer[:end].any():
        raise UserError(
            f"it has {length} tokens, and none of its answers begins within"
            f" max_seq_length={max_seq_length}"
        )
    return TokenizedExample(Prompt(prompt.ids[:end], runs), is_answer[:end], was_cut=True)
