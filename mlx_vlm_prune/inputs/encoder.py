"""Texts to ids and back by a stranger's tokenizer: whatever it does wrong is one sentence."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from ..checkpoints.errors import UserError
from ..checkpoints.processor import read_checked_tokenizer
from ..checkpoints.tokenizer_trial import TokenizerTrial, library_errors

LONGEST_TOKEN = 1 << 14  # characters that one id may stand for


@dataclass(frozen=True)
class Encoder:
    """A tokenizer of the library's; with a `trial`, a text is tried in a process of its own first.

    `name` is the folder that it came from.
    """

    backend: tokenizers.Tokenizer
    name: str
    trial: TokenizerTrial | None = None

    @classmethod
    def from_folder(cls, folder: Path, advice: str = "") -> "Encoder":
        """Raises UserError, which ends in `advice` where there is no tokenizer.json."""
        backend, trial = read_checked_tokenizer(folder, advice)
        return cls(backend, str(folder), trial)

    def encode(self, text: str, add_special_tokens: bool = False) -> tokenizers.Encoding:
        """Raises UserError where the tokenizer fails, or takes too long."""
        if self.trial:
            self.trial.check(text)
        with library_errors(f"the tokenizer of {self.name} fails"):
            return self.backend.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens. Raises UserError."""
        with library_errors(f"the tokenizer of {self.name} fails"):
            text = self.backend.decode(ids, skip_special_tokens=True)
        if len(text) > LONGEST_TOKEN * (1 + len(ids)):
            raise UserError(
                f"the tokenizer of {self.name} makes {len(text)} characters of {len(ids)} ids"
            )
        return text
