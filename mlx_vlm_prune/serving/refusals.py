"""Why a request gets no answer: a sentence with a status of HTTP."""

from typing import Any

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


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
