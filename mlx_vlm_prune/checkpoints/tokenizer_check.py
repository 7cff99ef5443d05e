"""A stranger's tokenizer.json, looked through before the library builds it.

Building and encoding run in compiled code, which nothing interrupts. So what stands before the
vocabulary is bounded first: how many characters a normalizer makes of one, what a table of
replacements claims, how long expressions backtrack. The vocabulary is not read here.
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError
from .reading.files import parse_json
from .reading.regexes import read_expression

MOST_GROWTH = 64  # characters that may come of one
MOST_STEPS = 256  # of a normalizer, a pre-tokenizer or a decoder
MOST_ADDED = 4096  # ids that a post-processor may put around a text
LONGEST_WORD = 1000  # characters that WordPiece may compare with all of its beginnings
SEQUENCES = ("normalizers", "pretokenizers", "decoders", "processors")
# How many characters one can become, where something was put in its place before.
SPREADING = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 2, "BertNormalizer": 6}
SPLITTING = {
    "BertPreTokenizer", "CharDelimiterSplit", "Delimiter", "Digits", "FixedLength", "Metaspace",
    "Nmt", "Punctuation", "Split", "Strip", "StripAccents", "UnicodeScripts", "Whitespace",
    "WhitespaceSplit", "Fuse", "ByteFallback", "WordPiece", "CTC", "BPEDecoder", "Prepend",
}  # fmt: skip
BYTES_OF_CHARACTER = 4  # the growth of ByteLevel, and of what is not known
MODEL = re.compile(rb'"model"\s*:\s*\{')
# A field behind the end of an object; inside a model, behind its vocabulary.
NEXT_FIELD = re.compile(rb'\}\s*,\s*"((?:[^"\\]|\\.)*)"\s*:')
MODEL_FIELDS = {
    b"merges", b"unk_token", b"max_input_chars_per_word", b"continuing_subword_prefix", b"type",
    b"unk_id", b"byte_fallback", b"dropout", b"end_of_word_suffix", b"fuse_unk", b"ignore_merges",
}  # fmt: skip


def check_tokenizer(data: bytes, file: Path) -> str | None:
    """None for a tokenizer.json that takes little time and memory on any text, else what about it
    cannot be bounded, as the end of a sentence. Raises UserError for what is surely too much."""
    try:
        parts = _parts(data)
    except ValueError as problem:
        raise UserError(f"{file} is not a tokenizer: it {problem}") from None
    try:
        spread = _Spread()
        for name in ("normalizer", "pre_tokenizer"):
            spread.add(parts.get(name), name)
        doubt = spread.doubt
        spread = _Spread()
        spread.add(parts.get("decoder"), "decoder")
        if spread.doubt:
            raise ValueError(spread.doubt)
        _check_post_processor(parts.get("post_processor"))
    except ValueError as problem:
        raise UserError(f"{file}: {problem}") from None
    return doubt


def check_model(model: Any, file: Path) -> None:
    """UserError for a model, once it is built, whose words may take too long."""
    for name in ("max_input_chars_per_word", "continuing_subword_prefix", "end_of_word_suffix"):
        value = getattr(model, name, None)
        size = len(value) if isinstance(value, str) else value if isinstance(value, int) else 0
        if size > LONGEST_WORD:
            raise UserError(f"{file}: {name} is {size} characters; at most {LONGEST_WORD} are read")


def _parts(data: bytes) -> dict[str, Any]:
    """What stands beside the model. ValueError, the end of a sentence, where that is no JSON.

    A model comes last, and is left out unread. Where it does not, the whole file is read.
    """
    model = MODEL.search(data)
    if model:
        try:
            parts = _json_object(data[: model.start()].rstrip().removesuffix(b",") + b"}")
        except ValueError:  # a text of the file looks like a model
            parts = None
        fields = [field[1] for field in NEXT_FIELD.finditer(data, model.end())]
        if parts is not None and len(fields) <= 1 and MODEL_FIELDS.issuperset(fields):
            return parts
    return _json_object(data)


def _json_object(data: bytes) -> dict[str, Any]:
    content = parse_json(data, pairs=_no_field_twice)
    if not isinstance(content, dict):
        raise ValueError("must hold a JSON object")
    return content


def _no_field_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("names a field twice")
    return fields


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or the like, those inside sequences too, in order."""
    rest = [part]
    while rest:
        step = rest.pop()
        if not isinstance(step, Mapping):
            continue
        listed = next((step[name] for name in SEQUENCES if isinstance(step.get(name), list)), None)
        if listed is None:
            yield step
        else:
            rest += reversed(listed)


@dataclass
class _Spread:
    """How many characters one can become, step after step."""

    growth: int = 1
    tailored: bool = False  # did a step put in characters, which a later one may multiply?
    doubt: str | None = None

    def add(self, part: Any, name: str) -> None:
        """Raises ValueError, a sentence, for more than are allowed."""
        for count, step in enumerate(_steps(part)):
            if count >= MOST_STEPS:
                raise ValueError(f"its {name} has more than {MOST_STEPS} steps")
            self.growth *= self._of(step)
            if self.growth > MOST_GROWTH:
                raise ValueError(f"its {name} makes more than {MOST_GROWTH} characters of one")

    def _of(self, step: Mapping[str, Any]) -> int:
        """The growth in one step, which is told by its fields: their type may be left out."""
        kind, length = step.get("type"), step.get("length", 1)
        if type(length) is not int or length < 1:
            raise ValueError(f"its {kind} splits after {length!r} characters; at least 1 is needed")
        charsmap = step.get("precompiled_charsmap")
        if isinstance(charsmap, str):
            return self._of_charsmap(charsmap)
        if "pattern" in step:
            return self._of_pattern(step["pattern"], step.get("content"))
        for name in ("content", "prepend"):
            if isinstance(step.get(name), str) and len(step[name]) > MOST_GROWTH:
                raise ValueError(f"its {kind} puts {len(step[name])} characters in")
        if kind in SPREADING:
            growth = SPREADING[kind] if self.tailored else 1
            self.tailored = True  # a second one may spread what this one made
            return growth
        return 1 if kind in SPLITTING else BYTES_OF_CHARACTER

    def _of_pattern(self, pattern: Any, content: Any) -> int:
        expression, text = None, ""
        if isinstance(pattern, Mapping):
            regex, text = pattern.get("Regex"), pattern.get("String", "")
            if isinstance(regex, str):
                expression = read_expression(regex)
                if not expression.harmless:
                    self.doubt = f"the expression {regex[:60]!r} may take any time"
        if not isinstance(content, str):  # it splits
            return 1
        self.tailored |= not content.isascii()
        if expression:
            return max(len(content), 1) + expression.empty
        if not text:
            return 1 + len(content)
        return max(-(-len(content) // len(text)), 1) if isinstance(text, str) else 1

    def _of_charsmap(self, charsmap: str) -> int:
        self.tailored = True
        try:
            data = base64.b64decode(charsmap, validate=True)
            size = int.from_bytes(data[:4], "little")
            if not 4 <= size <= len(data) - 4 or size % 4:
                raise ValueError
            texts = data[4 + size :].decode("utf-8")
        except (binascii.Error, ValueError):
            raise ValueError(
                f"its precompiled_charsmap, of {len(charsmap)} characters, is damaged"
            ) from None
        units = np.frombuffer(data[4 : 4 + size], dtype="<u4")
        if not _is_sound(units, data[4 + size :]):
            self.doubt = "its precompiled_charsmap may point outside itself"
        return max(map(len, texts.split("\0")), default=1) or 1


def _is_sound(units: np.ndarray, texts: bytes) -> bool:
    """Does every way through a double-array trie end inside it, at the beginning of a text?"""
    unit = units.astype(np.int64)
    follows = np.arange(len(unit)) ^ ((unit >> 10) << ((unit & 512) >> 6))
    is_node = unit >> 31 == 0
    if not (follows[is_node] | 255 < len(unit)).all():
        return False
    ends = unit[follows[is_node & (unit & 256 > 0)]] & 0x7FFFFFFF
    if not (ends < len(texts)).all():
        return False
    return not (np.frombuffer(texts, np.uint8)[ends] & 0xC0 == 0x80).any()


def _check_post_processor(part: Any) -> None:
    """ValueError, a sentence, for one that puts too much around a text."""
    copies, added = 1, 0
    for count, step in enumerate(_steps(part)):
        copied_by, added_by = [1], [0]  # a text is put into one of two forms
        for form in ("single", "pair"):
            pieces = step.get(form)
            if not isinstance(pieces, list):
                continue
            tokens = step.get("special_tokens")
            ids = _ids_of_tokens(tokens if isinstance(tokens, Mapping) else {})
            inner = [piece for piece in pieces if isinstance(piece, Mapping)]
            copied_by.append(sum("Sequence" in piece for piece in inner))
            added_by.append(sum(ids(piece) for piece in inner if "Sequence" not in piece))
        copies, added = copies * max(copied_by), added + max(added_by)
        if count >= MOST_STEPS:
            raise ValueError(f"its post_processor has more than {MOST_STEPS} steps")
        if copies > MOST_GROWTH:
            raise ValueError(
                f"its post_processor repeats a text {copies} times; at most {MOST_GROWTH} are"
                " allowed"
            )
        if added > MOST_ADDED:
            raise ValueError(
                f"its post_processor adds {added} tokens to a text; at most {MOST_ADDED} are"
                " allowed"
            )


def _ids_of_tokens(tokens: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], int]:
    """How many ids a piece stands for."""

    def count(piece: Mapping[str, Any]) -> int:
        special = piece.get("SpecialToken")
        name = special.get("id") if isinstance(special, Mapping) else None
        token = tokens.get(name) if isinstance(name, str) else None
        ids = token.get("ids") if isinstance(token, Mapping) else None
        return len(ids) if isinstance(ids, list) else 1

    return count
