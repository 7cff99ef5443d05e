"""Grades by a language model behind an OpenAI-compatible server, kept in a file as they come.

A format whose responses are graded says what is asked (`grade_prompt`) and what a reply means
(`parse_grade`). The server is the user's: `POST URL/chat/completions`. A key in OPENAI_API_KEY is
sent with each request. Equal responses to a question are graded once, by whatever method they came.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import append_json, parse_json
from .questions import Question

TEMPERATURES = (0.0, 0.0, 0.5, 1.0, 1.5)  # of the first request, and of those after no grade
GRADE_TOKENS = 3
SECONDS = 120  # a reply may take
BUSY, PAUSES = (429, 502, 503, 504), (1, 5, 30, 60)  # codes, and seconds before the next request


class LanguageJudge:
    """The grade of a response, 0 to 1. The grades of earlier runs are read from `path`."""

    def __init__(self, rule: ModuleType, url: str, model: str, path: Path):
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise UserError(f"judge_url is {url!r}; it is like http://127.0.0.1:8000/v1")
        self.rule, self.url, self.model, self.path = rule, url.rstrip("/"), model, path
        self.pause: Callable[[float], object] = time.sleep
        self.grades = self._read()

    def __call__(self, question: Question, response: str) -> float:
        key = self._key(question, response)
        if key not in self.grades:
            grade, reply = self._grade(question, response)
            row = {"key": key, "id": question.id, "grade": grade, "reply": reply}
            append_json(self.path, row)
            self.grades[key] = grade
        return self.grades[key]

    def _read(self) -> dict[str, float]:
        grades: dict[str, float] = {}
        if not self.path.is_file():
            return grades
        content = self.path.read_bytes()
        complete, _, cut_off = content.rpartition(b"\n")
        if cut_off:  # it is graded again
            os.truncate(self.path, len(content) - len(cut_off))
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                row = parse_json(line)
                grades[str(row["key"])] = float(row["grade"])
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{self.path}, line {number}: this is no grade") from None
        return grades

    def _key(self, question: Question, response: str) -> str:
        parts = [self.model, self.rule.grade_prompt(question, response)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _grade(self, question: Question, response: str) -> tuple[float, str]:
        """The grade and the reply it was read from; 0 where no reply is a grade."""
        reply = ""
        for n, temperature in enumerate(TEMPERATURES):
            prompt = self.rule.grade_prompt(question, response, again=n > 0)
            reply = self._reply(prompt, temperature)
            grade = self.rule.parse_grade(reply)
            if grade is not None:
                return grade, reply
        return 0.0, reply

    def _reply(self, prompt: str, temperature: float) -> str:
        body = {"model": self.model, "max_tokens": GRADE_TOKENS, "temperature": temperature,
                "messages": [{"role": "user", "content": prompt}]}  # fmt: skip
        for pause in (*PAUSES, None):
            try:
                return self._content(self._post(body))
            except HTTPError as e:
                if e.code not in BUSY or pause is None:
                    raise UserError(f"the judge at {self.url} refused: {_words(e)}") from None
                self.pause(pause)
            except (URLError, OSError) as e:
                why = getattr(e, "reason", None) or e
                raise UserError(f"the judge at {self.url} does not answer ({why})") from None
        raise AssertionError("the last pause is none")

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        with urlopen(request, timeout=SECONDS) as answer:
            content: bytes = answer.read()
        return content

    def _content(self, answer: bytes) -> str:
        try:
            content = parse_json(answer)["choices"][0]["message"]["content"]
        except (ValueError, TypeError, KeyError, IndexError):
            raise UserError(f"the judge at {self.url} sent no chat completion") from None
        return content if isinstance(content, str) else ""


def _words(error: HTTPError) -> str:
    """An error's code and the beginning of its text, in one line."""
    text = " ".join(error.read(400).decode("utf-8", "replace").split())
    return f"{error.code} {error.reason}" + (f", {text}" if text else "")
