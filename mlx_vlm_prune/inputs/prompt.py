"""From a question to token ids with room for the images, and from ids back to text.

`tokenizers` and a sandboxed jinja2 do the work; transformers is not imported (it takes
seconds). The ids equal transformers' own, see the tests.
"""

import os
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from ..checkpoints.errors import UserError, check_text, quoted, reason
from ..checkpoints.processor import (
    chat_template,
    end_ids,
    end_tokens,
    special_tokens,
    token_settings,
)
from ..checkpoints.reading.fields import LARGEST
from ..checkpoints.tokenizer_trial import TokenizerTrial
from .encoder import Encoder
from .template import ChatTemplate

IMAGE_MARK = "<image>"
VICUNA = (  # as LLaVA-1.5 was trained; for folders without a template of their own
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the user's questions.{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %} ASSISTANT: {{ m['content'] }}</s>"
    "{% elif m['role'] == 'user' %} USER: {{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
PRIVATE_USE = range(0xE000, 0xF900)  # characters without a meaning of their own


class Tokenizer:
    """A tokenizer.json with the chat template and special tokens of its config."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: dict[str, Any] | None = None,
        chat_template: str | None = None,
        name: str = "the tokenizer",
        ends: Collection[int] = (),
        trial: TokenizerTrial | None = None,
    ):
        """`ends` are ids that end an answer beside that of `eos_token`. By a `trial` each text is
        tried first: see `Encoder`."""
        self.backend, self.encoder = backend, Encoder(backend, name, trial)
        self.backend.no_truncation()  # some files carry these settings over from training
        self.backend.no_padding()
        self.chat_template = chat_template
        self.name = name
        self.special_tokens = special_tokens(config or {})
        self.ends = frozenset(ends)

    @classmethod
    def from_folder(
        cls, path: str | os.PathLike[str], model: str | os.PathLike[str] | None = None
    ) -> "Tokenizer":
        """Read tokenizer.json and what lies beside it: tokens, chat template, ends of an answer.

        `model` is the model's folder where that is another: it may name more ends.
        Raises UserError that names the file.
        """
        folder = Path(path)
        encoder, config = Encoder.from_folder(folder), token_settings(folder)
        backend = encoder.backend
        tokens = (backend.token_to_id(token) for token in end_tokens(folder))
        ids = {number for number in tokens if number is not None}
        for place in {folder, Path(model or folder)}:
            ids |= {n for n in end_ids(place) if n <= LARGEST and backend.id_to_token(n)}
        template = chat_template(folder, config)
        return cls(backend, config, template, str(folder), ids, encoder.trial)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it stands: nothing is put before or after it."""
        return self.encoding(text).ids

    def encoding(self, text: str) -> tokenizers.Encoding:
        """Ids with the characters each came from: `offsets` count characters, not bytes."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError("the prompt is not valid Unicode text") from None
        return self.encoder.encode(text)

    def missing_bos(self, text: str) -> str:
        """The BOS token where the tokenizer puts it before texts and this text lacks it, else "".

        Llama's tokenizer does, and LLaVA's templates leave it out.
        """
        bos = self.special_tokens.get("bos_token")
        first = self.encoder.encode("", add_special_tokens=True).tokens[:1]
        return bos if bos and first == [bos] and not text.startswith(bos) else ""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens. Bytes that are no character become one
        replacement sign for each beginning of a character, as Python decodes them."""
        shown = self._with_whole_characters(ids) if self._byte_of else list(ids)
        return self.encoder.decode(shown)

    def _with_whole_characters(self, ids: Sequence[int]) -> list[int]:
        """The ids, with bytes of replacement signs for those that are no character: `tokenizers`
        would show a sign for every byte of the run that they lie in, whole characters too."""
        ids, shown, run = [i for i in ids if i not in self._skipped], [], bytearray()
        for i in [*ids, None]:
            if i in self._byte_of:
                run.append(self._byte_of[i])
                continue
            whole = run.decode("utf-8", "replace").encode()
            shown += [self._id_of_byte[byte] for byte in whole]
            run.clear()
            shown += [] if i is None else [i]
        return shown

    @cached_property
    def _byte_of(self) -> dict[int | None, int]:
        """The byte of each token <0x00> to <0xFF>, where the tokenizer falls back on bytes."""
        decoder = self.backend.decoder
        if decoder is None or b"ByteFallback" not in decoder.__getstate__():
            return {}
        ids = [self.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        return {} if None in ids else {number: byte for byte, number in enumerate(ids)}

    @cached_property
    def _id_of_byte(self) -> dict[int, int]:
        return {byte: number for number, byte in self._byte_of.items() if number is not None}

    @cached_property
    def _skipped(self) -> frozenset[int]:
        """The special tokens, which no text shows."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    def token_id(self, token: str) -> int:
        """The id of one token; UserError if the vocabulary lacks it."""
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise UserError(f"the vocabulary of {self.name} has no token {quoted(token)}")
        return token_id

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids that end an answer; empty if no file names one."""
        token = self.special_tokens.get("eos_token")
        return self.ends if token is None else self.ends | {self.token_id(token)}

    def render(
        self, messages: list[dict[str, Any]], /, add_generation_prompt: bool = True, **extra: Any
    ) -> str:
        """Messages through the chat template; `extra` are its options, such as enable_thinking.

        A template is code by a stranger. It runs in a sandbox (template.py), and what goes wrong
        in it becomes a UserError.
        """
        values = {"tools": None, "documents": None, **self.special_tokens, **extra}
        values |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(values)
        except UserError:
            raise
        except Exception as problem:  # anything may happen in a stranger's code
            raise UserError(
                f"the chat template of {self.name} failed: {reason(problem)}"
            ) from problem

    @cached_property
    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise UserError(f"{self.name} has no chat template; ask without one (chat=False)")
        return ChatTemplate(self.chat_template)


@dataclass(frozen=True)
class Prompt:
    """Token ids, and (start, length) of each image's placeholders, in order, never overlapping."""

    ids: list[int]
    runs: list[tuple[int, int]]

    def limit_error(self, max_tokens: int, vocab_size: int) -> str | None:
        """Which limit of a model the prompt exceeds, as the end of a sentence; None if none."""
        if len(self.ids) > max_tokens:
            return f"has {len(self.ids)} tokens; the model reads up to {max_tokens}"
        if max(self.ids) >= vocab_size:
            return f"has token {max(self.ids)}; the model's vocabulary has {vocab_size}"
        return None


def tokenize_prompt(
    tokenizer: Tokenizer,
    text: str,
    tokens_per_image: Sequence[int],
    image_token: str,
    chat: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Prompt:
    """A question about images as ids: one user turn of the chat template, or the bare text.

    `<image>` in the text marks where an image goes; without any, the images come first,
    each followed by a newline. Image i becomes `tokens_per_image[i]` copies of
    `image_token`. The text may hold that token, too: runs are found by character offsets.
    `options` are the template's own, such as open_thinking.
    Raises UserError: marks and images differ in number, the template drops the text, the
    tokenizer merges placeholders, or nothing is left to read.
    """
    parts = split_at_images(text, len(tokens_per_image))
    stand_in = unused_character(text, tokenizer.chat_template or "")
    content = stand_in.join(parts)
    if chat:
        content = _render_turn(tokenizer, content, options or {})
    return place_images(tokenizer, content, stand_in, tokens_per_image, image_token)


def place_images(
    tokenizer: Tokenizer, text: str, stand_in: str, tokens_per_image: Sequence[int],
    image_token: str,
) -> Prompt:  # fmt: skip
    """A rendered text as ids, with placeholders in place of each `stand_in`, one an image."""
    expanded, *after = text.split(stand_in)
    if len(after) != len(tokens_per_image):
        raise UserError(f"the chat template of {tokenizer.name} does not keep the user's text")
    starts = []
    for count, part in zip(tokens_per_image, after, strict=True):
        starts.append(len(expanded))
        expanded += image_token * count + part
    # Encoded in one piece: cut apart, white space beside an image would become other tokens.
    encoding = tokenizer.encoding(expanded)
    if not (ids := encoding.ids):
        raise UserError("the prompt is empty")
    runs = [
        placeholder_run(tokenizer, ids, encoding.offsets, *place, image_token)
        for place in zip(starts, tokens_per_image, strict=True)
    ]
    return Prompt(ids, runs)


def unused_character(*texts: str) -> str:
    """A character without a meaning that none of the texts has, so that a template keeps it."""
    used = set("".join(texts))
    return next(chr(c) for c in PRIVATE_USE if chr(c) not in used)


def _render_turn(tokenizer: Tokenizer, content: str, options: Mapping[str, Any]) -> str:
    """One user turn, from the token that begins every text. Some templates, as LLaVA's, read
    content in parts only: a plain text would vanish."""
    turn = tokenizer.render([{"role": "user", "content": content}], **options)
    if content.strip() not in turn:
        parts = [{"type": "text", "text": content}]
        turn = tokenizer.render([{"role": "user", "content": parts}], **options)
    return tokenizer.missing_bos(turn) + turn


def split_at_images(text: str, images: int) -> list[str]:
    """The text before, between and after the images. Raises UserError."""
    check_text(text)
    parts = text.split(IMAGE_MARK)
    marks = len(parts) - 1
    if marks == images:
        return parts
    if marks == 0:
        return ["", *["\n"] * (images - 1), "\n" + text]
    raise UserError(
        f"the prompt has {marks} {IMAGE_MARK} mark{'s' * (marks != 1)} but there "
        f"{'is 1 image' if images == 1 else f'are {images} images'}; give as many of each, "
        "or no mark at all"
    )


def placeholder_run(
    tokenizer: Tokenizer, ids: Sequence[int], offsets: Sequence[tuple[int, int]], start: int,
    count: int, image_token: str,
) -> tuple[int, int]:  # fmt: skip
    """The run that covers `count` placeholders from character `start` on, each one token.

    `offsets` are the characters that each id came from.
    """
    width, token = len(image_token), tokenizer.token_id(image_token)
    expected = [(start + i * width, start + (i + 1) * width) for i in range(count)]
    first = bisect_left(offsets, (start, start + 1))
    is_apart = list(offsets[first : first + count]) == expected
    if not is_apart or list(ids[first : first + count]) != [token] * count:
        raise UserError(
            f"the tokenizer of {tokenizer.name} does not keep {quoted(image_token)} apart"
        )
    return first, count
