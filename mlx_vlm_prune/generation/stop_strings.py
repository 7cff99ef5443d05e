"""Texts at which an answer ends, found across its pieces."""

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop text; holds back what may be the begin of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop, self.held = [*stop], ""
        self.is_found = False

    def add(self, text: str, is_last: bool) -> str:
        """The text that can be sent."""
        self.held += text
        places = [place for stop in self.stop if (place := self.held.find(stop)) >= 0]
        if places:
            self.is_found = True
            sent, self.held = self.held[: min(places)], ""
            return sent
        keep = 0 if is_last else self._length_held_back()
        cut = len(self.held) - keep
        sent, self.held = self.held[:cut], self.held[cut:]
        return sent

    def _length_held_back(self) -> int:
        """How many characters at the end may begin a stop text."""
        longest = max((len(stop) for stop in self.stop), default=1) - 1
        lengths = range(min(longest, len(self.held)), 0, -1)
        return next((n for n in lengths if self._begins_stop(self.held[-n:])), 0)

    def _begins_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self.stop)
