"""Further tokens that end an answer, which a user names beside the checkpoint's own."""

from collections.abc import Callable, Collection, Sequence

from ..checkpoints.errors import UserError

UNKNOWN = "\ue000"  # that no vocabulary has
ESCAPES = {"\\n": "\n", "\\t": "\t", "\\r": "\r"}  # as a shell hands them over


def end_token_ids(
    tokens: Collection[str | int] | str | int | None,
    token_to_id: Callable[[str], int | None],
    encode: Callable[[str], Sequence[int]],
    name: str,
) -> frozenset[int]:
    """The ids of tokens that end an answer.

    A number is an id. A text is a token of the vocabulary, or is encoded as a single one, or its
    digits are an id. Raises UserError for what is none of these; `name` is the tokenizer's.
    """
    if tokens is None:
        return frozenset()
    if isinstance(tokens, str | int):
        tokens = [tokens]
    return frozenset(_token_id(token, token_to_id, encode, name) for token in tokens)


def _token_id(
    token: str | int,
    token_to_id: Callable[[str], int | None],
    encode: Callable[[str], Sequence[int]],
    name: str,
) -> int:
    if isinstance(token, int):
        return token
    for text in (token, _unescape(token)):
        if (token_id := token_to_id(text)) is not None:
            return token_id
        if len(ids := encode(text)) == 1 and ids != encode(UNKNOWN):
            return int(ids[0])
    if token.isdecimal():
        return int(token)
    raise UserError(f"eos_tokens has {token!r}, which is no single token of {name}")


def _unescape(text: str) -> str:
    for escape, character in ESCAPES.items():
        text = text.replace(escape, character)
    return text
