"""From ids to text as they come."""

from .prompt import Tokenizer

INCOMPLETE = "\ufffd"  # what a decoder shows for bytes that are not (yet) a character


class Detokenizer:
    """Turns ids into text as they come; the pieces together equal `decode` of all ids.

    A character may need several tokens, and a token's leading space depends on the one
    before. So each piece is what a new id adds to the text of the few ids before it, held
    back while it ends in an incomplete character.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []  # the last ones printed, then those held back
        self.printed = 0  # how many of them are printed

    def add(self, token: int) -> str:
        """The text that is now safe to print, often of this id alone, sometimes empty."""
        self.ids.append(token)
        piece = self._held_back()
        if not piece or piece.endswith(INCOMPLETE):
            return ""
        self.ids = self.ids[self.printed :]
        self.printed = len(self.ids)
        return piece

    def finish(self) -> str:
        """What was held back: bytes that never became a character."""
        piece = self._held_back()
        self.printed = len(self.ids)
        return piece

    def _held_back(self) -> str:
        before = self.tokenizer.decode(self.ids[: self.printed])
        return self.tokenizer.decode(self.ids)[len(before) :]
