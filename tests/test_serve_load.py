"""Promises of `serve` under load: nothing is lost, and who leaves, errs or ends it harms nobody."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_vlm_prune import load
from mlx_vlm_prune.generation.request import Request
from mlx_vlm_prune.generation.running_batch import OwnRunningBatch

from .entry_points import ROOT
from .golden_requests import make_folder
from .serving import PATIENCE, Served, noise, question, serve, slow_down, text_of

LONG = 3000  # tokens, some seconds
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("load"))


@pytest.fixture(scope="module")
def loaded(home):
    """A model whose answers do not end by themselves."""
    return load(home / "tiny", dtype="float32")


@contextmanager
def open_stream(server: Served, tokens: int = LONG) -> Iterator[http.client.HTTPResponse]:
    """A stream that was begun; at the end of the block the client leaves."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    body = {"messages": [question("how many stars ?")], "max_tokens": tokens, "stream": True}
    connection.request("POST", PATH, json.dumps(body), {"content-type": "application/json"})
    reply = connection.getresponse()
    try:
        assert reply.status == 200 and reply.readline().startswith(b"data: ")
        yield reply
    finally:
        reply.close()
        connection.close()


@contextmanager
def half_a_body(server: Served) -> Iterator[None]:
    """A client that sends no more until the end of the block."""
    head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(f"{head}content-length: 99\r\n\r\n{{".encode())
        yield


def wait_for(condition: Any) -> None:
    """Until it holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_client_that_leaves_is_cancelled(loaded):
    with serve(*loaded) as server:
        with open_stream(server):
            assert server.metric("requests_running") == 1
        wait_for(lambda: server.metric("requests_running") == 0)
        wait_for(lambda: server.metric('requests_total{status="499"}') == 1)
        assert server.metric("generated_tokens_total") < LONG
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        body = {"messages": [question("how many stars ?")], "max_tokens": LONG}
        connection.request("POST", PATH, json.dumps(body), {"content-type": "application/json"})
        wait_for(lambda: server.metric("requests_running") == 1)
        connection.close()  # also where the answer is wanted in one piece
        wait_for(lambda: server.metric("requests_running") == 0)
        wait_for(lambda: server.metric('requests_total{status="499"}') == 2)


def test_a_full_queue_refuses_and_a_place_in_it_is_free_again(loaded):
    with serve(*loaded, batch=1, queue=1) as server, ThreadPoolExecutor(1) as other:
        with open_stream(server):
            waiting = other.submit(server.chat, question("is it red ?"), max_tokens=3)
            wait_for(lambda: server.metric("requests_waiting") == 1)
            status, content = server.post(question("yes ?"), max_tokens=1)
            assert (status, content["error"]["type"]) == (429, "rate_limit_error")
        assert text_of(waiting.result())
        assert text_of(server.chat(question("yes ?"), max_tokens=3))


def test_a_stream_goes_on_while_others_are_prepared(loaded, monkeypatch):
    has_begun, may_go_on = threading.Event(), threading.Event()
    prepare = OwnRunningBatch.prepare

    def prepare_late(self: OwnRunningBatch, request: Request) -> Any:
        if request.prompt == "yes ?":
            has_begun.set()
            assert may_go_on.wait(PATIENCE)
        return prepare(self, request)

    monkeypatch.setattr(OwnRunningBatch, "prepare", prepare_late)
    slow_down(OwnRunningBatch, monkeypatch)
    with serve(*loaded) as server, open_stream(server, 50) as reply, ThreadPoolExecutor(4) as more:
        waiting = [more.submit(server.chat, question("yes ?"), max_tokens=2) for _ in "abcd"]
        try:
            assert has_begun.wait(PATIENCE) and server.metric("requests_running") == 1
            assert reply.read().endswith(b"data: [DONE]\n\n")
            assert not any(one.done() for one in waiting)
        finally:
            may_go_on.set()
        assert len({text_of(one.result()) for one in waiting}) == 1


def test_an_answer_that_takes_too_long_ends(loaded):
    with serve(*loaded, timeout=0.3) as server:
        status, content = server.post(question("how many stars ?"), max_tokens=LONG)
        sentence = "the answer was not complete within 0.3 seconds"
        assert (status, content["error"]["message"]) == (504, sentence)
        with open_stream(server) as reply:
            last = reply.read().decode().split("\n\n")[-2]
            assert json.loads(last.removeprefix("data: "))["error"]["message"] == sentence
        wait_for(lambda: server.metric("requests_running") == 0)
        assert server.chat(question("yes ?"), max_tokens=1)


def test_an_error_in_a_step_ends_those_of_the_batch_and_no_later_request(loaded, monkeypatch):
    from mlx_vlm_prune.models.joined_prompts import JoinedPrompts

    def fail(*_: Any) -> Any:
        raise RuntimeError("no memory")

    with serve(*loaded) as server:
        with monkeypatch.context() as broken:
            broken.setattr(JoinedPrompts, "step", fail)
            status, content = server.post(question("yes ?"), max_tokens=5)
        assert (status, content["error"]["type"]) == (500, "server_error")
        assert server.chat(question("yes ?"), max_tokens=5)


BUDGETS = [{}, {"visual_tokens": 5}, {"keep_ratio": 0.5}, {"visual_tokens": 9, "pruner": "avgpool"}]
BAD = [
    {"messages": [], "max_tokens": 3},
    {"messages": [question("a ?", noise(2, 900))]},
    {"messages": [question("a ?", noise(9, 9))], "pruner": "nom"},
    b"{",
]


def test_every_good_answer_equals_the_one_it_gets_alone_and_none_is_lost(loaded):
    """60 requests, 16 at once: a fifth bad or cancelled."""
    pictures = [noise(70, 80, seed) for seed in range(3)]

    def good(n: int) -> tuple[str, int]:
        message = question("how many stars ?", pictures[n % 3])
        content = server.chat(message, **BUDGETS[n % 4], max_tokens=4 + n % 4)
        return text_of(content), content["usage"]["prompt_tokens"]

    def one(n: int) -> Any:
        if n % 10 == 3:
            status, _ = server.call(PATH, BAD[n // 10 % len(BAD)])
            return status
        if n % 10 == 7:
            with open_stream(server):
                return None
        return good(n)

    with serve(*loaded, queue=100) as server:
        alone = [good(n) for n in range(12)]  # then they are the same again
        with ThreadPoolExecutor(16) as clients:
            outcomes = list(clients.map(one, range(60)))
        wait_for(lambda: server.metric("requests_running") == 0)
        for n, outcome in enumerate(outcomes):
            assert outcome == {3: 400, 7: None}.get(n % 10, alone[n % 12]), n
        assert server.metric("requests_waiting") == 0
        assert server.metric('requests_total{status="499"}') == 6
        assert server.metric('requests_total{status="400"}') == 6


@contextmanager
def command(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`mlx-vlm-prune serve` in a process, in a folder of its own; it is not up yet."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    words = [sys.executable, "-m", "mlx_vlm_prune", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(
        words, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def when_up(process: subprocess.Popen[str]) -> Served:
    """Where it answers, once it does."""
    assert process.stderr is not None
    line = next((line for line in process.stderr if "http://127.0.0.1:" in line), "")
    assert line, "it ended before that"
    return Served(int(line.rpartition(":")[2].partition("/")[0]))


def test_sigterm_drains_and_a_killed_server_leaves_nothing_behind(home, tmp_path):
    words = ["--model", str(home / "tiny")]
    with (
        command(tmp_path, *words) as process,
        command(tmp_path, *words) as killed,
        ThreadPoolExecutor(2) as others,
    ):
        server = when_up(process)
        answers = [
            others.submit(server.chat, question(text), max_tokens=LONG // 3)
            for text in ("how many stars ?", "is it red ?")
        ]
        with open_stream(server, LONG // 3) as reply, half_a_body(server):
            wait_for(lambda: server.metric("requests_running") == 3)
            process.send_signal(signal.SIGTERM)
            assert reply.read().endswith(b"data: [DONE]\n\n")
            for answer in answers:
                assert answer.result()["usage"]["completion_tokens"] == LONG // 3
            assert process.wait(PATIENCE) == 0
        server = when_up(killed)
        with open_stream(server):
            killed.kill()
        killed.wait()
        with pytest.raises(OSError):
            server.call("/health")
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"mlx"}  # MLX's own, of what it compiled for this CPU
