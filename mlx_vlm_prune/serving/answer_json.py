"""OpenAI's JSON of answers, whole or in chunks, with our figures in `usage`."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from .engine import Piece
from .refusals import RequestRefusedError

DONE = "data: [DONE]\n\n"


@dataclass
class AnswerJson:
    """An answer's id, model and time, which all its chunks share."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(
        self, text: str, reason: str, usage: dict[str, Any], warnings: Sequence[str]
    ) -> dict[str, Any]:
        """The whole answer."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        head = self._head("chat.completion", [choice])
        return {**head, "usage": usage, "warnings": list(warnings)}

    def chunk(
        self, delta: dict[str, str], reason: str | None = None, warnings: Sequence[str] = ()
    ) -> str:
        """A piece of the answer, as an event of the stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        content = self._head("chat.completion.chunk", [choice])
        return _event({**content, "warnings": list(warnings)} if warnings else content)

    def usage_chunk(self, usage: dict[str, Any], warnings: Sequence[str]) -> str:
        """The figures, behind the last piece."""
        head = self._head("chat.completion.chunk", [])
        return _event({**head, "usage": usage, "warnings": list(warnings)})

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "choices": choices,
        }  # fmt: skip


def usage_of(piece: Piece) -> dict[str, Any]:
    """OpenAI's counts and ours, by an answer's latest piece.

    `prompt_tokens` are the rows that the model read after pruning, `ttft_ms` milliseconds from the
    request's first byte to its first token, by parts, `auto` why the method was chosen, if it was.
    """
    figures, tokens = piece.figures, piece.response.generation_tokens
    before = {"request": piece.request_ms, "queue": piece.queue_ms}
    ttft: dict[str, Any] = {**before, **figures.ttft_ms}
    ttft["total"] += sum(before.values())
    return {
        "prompt_tokens": figures.prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": figures.prompt_tokens + tokens,
        "prompt_tokens_details": {"cached_tokens": figures.rows_reused},
        "visual_tokens": figures.visual_tokens,
        "visual_tokens_kept": figures.visual_tokens_kept,
        "pruner": figures.pruner,
        **({"auto": figures.auto} if figures.auto else {}),
        "ttft_ms": {name: None if ms is None else round(ms, 3) for name, ms in ttft.items()},
    }


def error_event(refusal: RequestRefusedError) -> str:
    """Why a stream ends early."""
    return _event(refusal.as_json)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
