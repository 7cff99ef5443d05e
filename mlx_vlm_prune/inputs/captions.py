"""Texts as CLIP's and SigLIP's text towers read them: token ids of one length.

`tokenizers` does the work; the ids equal those of transformers' tokenizers, see the tests.

Shapes: T texts, L tokens of each.
"""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.dual_encoder import LEGACY_EOS, DualEncoderConfig
from ..checkpoints.errors import UserError, check_text
from ..checkpoints.processor import TOKENIZER_CONFIG, special_tokens, token_settings
from .encoder import Encoder
from .preprocessor import Preprocessor

SIGLIP_CLASS, SIGLIP2_CLASS = "SiglipTokenizer", "Siglip2Tokenizer"
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class EncoderProcessor:
    """What turns images into pixels and texts into ids, for a CLIP or SigLIP."""

    config: DualEncoderConfig
    image: Preprocessor
    name: str  # of the checkpoint, as the user gave it
    folder: Path

    @cached_property
    def captions(self) -> "CaptionTokenizer":
        """Read when a text is. Raises UserError where the folder has no tokenizer.json."""
        return CaptionTokenizer.from_folder(self.folder, self.config)


@dataclass(frozen=True)
class CaptionTokenizer:
    """A tokenizer.json, and how its model was trained to read texts.

    CLIP's ends each text with an end token; shorter texts are padded behind it, which the tower
    does not see. SigLIP's pads to the full length, which the tower does see.
    """

    encoder: Encoder
    settings: Mapping[str, Any]  # tokenizer_config.json
    config: DualEncoderConfig
    name: str

    @classmethod
    def from_folder(cls, folder: Path, config: DualEncoderConfig) -> "CaptionTokenizer":
        """Raises UserError where there is no tokenizer.json, or it is damaged."""
        encoder = Encoder.from_folder(folder, ", which texts need")
        encoder.backend.no_truncation()
        encoder.backend.no_padding()
        return cls(encoder, token_settings(folder), config, str(folder))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids (T, L). Raises UserError for a text that is longer than the model reads."""
        ids = [self._ids(text) for text in texts]
        if self.config.is_clip:
            longest = max(map(len, ids))
            return np.array([row + [row[-1]] * (longest - len(row)) for row in ids])
        length, padding = self.config.text.max_position_embeddings, self._special_id("pad_token")
        pads = [[padding] * (length - len(row)) for row in ids]
        rows = zip(pads, ids, strict=True)
        return np.array([p + row if self._pads_left else row + p for p, row in rows])

    def _ids(self, text: str) -> list[int]:
        check_text(text, "a text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"the text {text!r} is not valid Unicode") from None
        ids = self.encoder.encode(self._canonical(text), add_special_tokens=True).ids
        if self._class == SIGLIP_CLASS and ids[-1:] != [eos := self._special_id("eos_token")]:
            ids = [*ids, eos]
        most, sizes = self.config.text.max_position_embeddings, self.config.text
        if len(ids) > most:
            raise UserError(
                f"the text {text[:40]!r} has {len(ids)} tokens; this model reads {most}"
            )
        if max(ids, default=sizes.vocab_size) >= sizes.vocab_size:
            raise UserError(f"{self.name}: its tokenizer is not that of its weights, {text[:40]!r}")
        eos_id = sizes.eos_token_id
        if self.config.is_clip and eos_id != LEGACY_EOS and eos_id not in ids:
            raise UserError(f"{self.name}: its tokenizer ends no text with eos_token_id {eos_id}")
        return ids

    @property
    def _class(self) -> str:
        """The tokenizer's class in transformers, in any of its versions."""
        name = self.settings.get("tokenizer_class")
        return name.removesuffix("Fast") if isinstance(name, str) else ""

    @property
    def _pads_left(self) -> bool:
        usual = "left" if self._class == SIGLIP2_CLASS else "right"
        return self.settings.get("padding_side", usual) == "left"

    def _canonical(self, text: str) -> str:
        """As SigLIP was trained: lower case; the first one's also without punctuation."""
        if self.config.is_clip:
            return text  # its tokenizer.json does the same
        if self.settings.get("do_lower_case", self._class in (SIGLIP_CLASS, SIGLIP2_CLASS)) is True:
            text = text.lower()
        if self._class == SIGLIP_CLASS:
            text = re.sub(r"\s+", " ", text.translate(PUNCTUATION)).strip()
        return text

    def _special_id(self, name: str) -> int:
        token = special_tokens(dict(self.settings)).get(name)
        number = None if token is None else self.encoder.backend.token_to_id(token)
        if number is None:
            raise UserError(f"{self.name}: {TOKENIZER_CONFIG} names no {name} of its vocabulary")
        return number
