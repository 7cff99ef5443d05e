"""Why a request gets no answer, and what of an answered one is not followed: sentences."""

import re
from dataclasses import dataclass, field
from typing import Any

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
CLIENT_GONE = 499  # as nginx counts them; nobody gets this answer
# Names of the API, or of the command line, in place of Python's.
NAMES = {"keep_tokens": "visual_tokens", "max_pixels": "the server's --max-pixels"}


class RequestRefusedError(Exception):
    """A request that ends in one sentence; `field` is what in it is at fault."""

    def __init__(self, sentence: str, status: int = 400, field: str | None = None) -> None:
        super().__init__(sentence)
        self.sentence, self.status, self.field = sentence, status, field

    @property
    def as_json(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        kind = KINDS.get(self.status, usual)
        error = {"message": self.sentence, "type": kind, "param": self.field, "code": self.status}
        return {"error": error}


def client_gone() -> RequestRefusedError:
    """For a client that has left."""
    return RequestRefusedError("the client has left", CLIENT_GONE)


def in_api_words(sentence: str) -> str:
    """A sentence about Python's parameters, with the names that they have in a request."""
    return re.sub(rf"\b({'|'.join(NAMES)})\b", lambda name: NAMES[name[0]], sentence)


@dataclass
class Notes:
    """Sentences about what of a request is not followed."""

    is_strict: bool
    warnings: list[str] = field(default_factory=list)

    def warn(self, sentence: str, name: str | None = None, status: int = 400) -> None:
        """Note what cannot be met. Raises RequestRefusedError for a strict request."""
        if self.is_strict:
            raise RequestRefusedError(sentence, status, name)
        self.warnings.append(sentence)
