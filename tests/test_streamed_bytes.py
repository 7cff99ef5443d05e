"""Promises about tokenizers that fall back on bytes: what is streamed is the whole text.

Oracle: the bytes of each run, decoded by Python.
"""

import random

import pytest
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from mlx_vlm_prune.inputs.detokenizer import INCOMPLETE, Detokenizer
from mlx_vlm_prune.inputs.prompt import Tokenizer

WORDS = ["▁a", "b", "▁", "é", "▁€", "\ufffd"]
END = 256 + len(WORDS)


@pytest.fixture(scope="module")
def tokenizer():
    """As Llama's: words with a mark for a space, and 256 bytes."""
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *WORDS, "</s>"]
    words = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(words, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return Tokenizer(backend)


def expected(ids: list[int]) -> str:
    data = b"".join(
        bytes([i]) if i < 256 else WORDS[i - 256].replace("▁", " ").encode()
        for i in ids
        if i != END
    )
    return data.decode("utf-8", "replace").removeprefix(" ")


def sequence(draw: random.Random) -> list[int]:
    """Characters, whole or cut, stray bytes, words and ends."""
    ids: list[int] = []
    while len(ids) < draw.randrange(1, 12):
        kind = draw.randrange(5)
        if kind == 0:
            ids.append(draw.randrange(256))
        elif kind == 1:
            ids.append(256 + draw.randrange(len(WORDS) + 1))
        else:
            whole = chr(draw.choice([0x41, 0xE9, 0x20AC, 0x1F43C, 0xFFFD])).encode()
            ids += whole[: draw.randrange(1, 5)] if kind == 2 else whole
    return ids


def test_pieces_together_are_the_text_of_the_bytes(tokenizer):
    draw = random.Random(20)
    for _ in range(20_000):
        ids = sequence(draw)
        writer = Detokenizer(tokenizer)
        pieces = [*map(writer.add, ids), writer.finish()]
        assert "".join(pieces) == tokenizer.decode(ids) == expected(ids), ids


@pytest.mark.parametrize("length", [1, 2, 3])
def test_an_unfinished_character_is_one_sign(tokenizer, length):
    writer = Detokenizer(tokenizer)
    ids = [0x41, *"🐼".encode()[:length]]
    assert [*map(writer.add, ids), writer.finish()] == ["A", *[""] * length, INCOMPLETE]
