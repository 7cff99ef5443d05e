"""Promises of benchmarks/serving_load.py: it fails where an answer differs or is lost."""

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, repeat
from typing import Any

import pytest

from benchmarks import serving_load
from benchmarks.server_process import server_process
from mlx_vlm_prune.checkpoints.errors import UserError

REFUSALS = {content: (status, words) for content, status, words in serving_load.bad_bodies()}


class Site(BaseHTTPRequestHandler):
    """A server that answers each good request by its body, and refuses the bad ones."""

    fault = ""
    numbers = count()

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        status, answer = 200, {"choices": [len(content)]}
        if content in REFUSALS:
            status, words = REFUSALS[content]
            answer = {"error": {"message": words}}
        elif next(self.numbers) >= 60:  # those before are asked alone
            status, answer = FAULTS[self.fault](status, answer)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None:
        pass


FAULTS: dict[str, Any] = {
    "": lambda status, answer: (status, answer),
    "another answer": lambda status, answer: (200, {"choices": ["another"]}),
    "lost: 500": lambda status, answer: (500, {"error": {"message": "?"}}),
    "lost: KeyError": lambda status, answer: (200, {}),
    "memory grows": lambda status, answer: (status, answer),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_its_exit_code_says_whether_every_answer_was_that_of_the_request_alone(
    fault, monkeypatch, capsys
):
    class FaultySite(Site):
        numbers = count()

    FaultySite.fault = fault
    server = ThreadingHTTPServer(("127.0.0.1", 0), FaultySite)
    server.handle_error = lambda *_: None  # clients that leave
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()

    @contextmanager
    def serving(model: object, *options: str) -> Iterator[tuple[int, int]]:
        yield 0, server.server_port

    monkeypatch.setattr(serving_load, "serving", serving)
    megabytes = count(100) if fault == "memory grows" else repeat(100)
    monkeypatch.setattr(serving_load, "memory_mb", lambda process: next(megabytes))
    arguments = ["--requests", "80", "--clients", "4"]
    try:
        if fault:
            with pytest.raises(SystemExit) as end:
                serving_load.main(arguments)
            assert end.value.code == f"wrong: {fault}"
        else:
            serving_load.main(arguments)
    finally:
        server.shutdown()
        server.server_close()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    ends = result["ends"]
    answered = fault if fault in ends else "same as alone"
    assert ends == {"refused": 8, "left": 8, answered: 64}


WARNS = "import sys, time; print('a warning', file=sys.stderr)"
SERVES = "print('my-model: http://127.0.0.1:7/v1', file=sys.stderr, flush=True); time.sleep(60)"


@pytest.mark.parametrize("fault", [None, KeyError])
def test_a_server_is_found_behind_warnings_and_ends_with_the_block_whatever_happens(fault):
    words = [sys.executable, "-c", f"{WARNS}; {SERVES}"]
    with suppress(KeyError), server_process(words) as (process, address):
        assert address == "http://127.0.0.1:7/v1"
        if fault:
            raise fault
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_server_that_does_not_start_says_why():
    words = [sys.executable, "-c", f"{WARNS}; sys.exit('no memory')"]
    with (
        pytest.raises(UserError, match="the server did not start: no memory"),
        server_process(words),
    ):
        pass


def test_every_kind_of_bad_request_is_sent():
    words = " ".join(words for _, _, words in serving_load.bad_bodies())
    for kind in ("data URI is damaged", "2000 x 1", "17 pictures", "64 MB", "visual_token is not"):
        assert kind in words
    assert any(len(content) == 100_000_000 for content in REFUSALS)
