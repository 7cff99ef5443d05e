"""Promises of `serve` at its edge: who may ask, how fast, how much, and the JSON of every error."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.errors import UserError

from .golden_requests import make_folder
from .serving import PATIENCE, Served, noise, question, serve, text_of

from mlx_vlm_prune.generation.arguments import build_serve_parser  # isort: skip
from mlx_vlm_prune.serve import settings_of  # isort: skip
from mlx_vlm_prune.serving import app, connections  # isort: skip - needs FastAPI
from mlx_vlm_prune.serving.engine import Engine  # isort: skip
from mlx_vlm_prune.serving.open_requests import OpenRequest  # isort: skip

PATH, JSON = "/v1/chat/completions", "content-type: application/json"
SHORT = question("how many stars ?")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(make_folder(tmp_path_factory.mktemp("http")) / "tiny", dtype="float32")


@pytest.fixture(scope="module")
def served(loaded):
    with serve(*loaded) as server:
        yield server


def wait_for(condition: Any) -> None:
    """Until it holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def sending(
    server: Served, head: Any, content: str = "", receive_bytes: int = 0
) -> Iterator[socket.socket]:
    """A connection on which a head and some content were sent."""
    with socket.socket() as client:
        if receive_bytes:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        client.settimeout(PATIENCE)
        client.connect(("127.0.0.1", server.port))
        client.sendall(("\r\n".join([*head, "", ""]) + content).encode())
        yield client


def post(size: int, *more: str) -> tuple[str, ...]:
    return f"POST {PATH} HTTP/1.1", "host: 127.0.0.1", JSON, f"content-length: {size}", *more


@contextmanager
def open_stream(server: Served, message: Any = SHORT, **options: Any) -> Iterator[socket.socket]:
    """A long answer that has begun; at the end of the block its client leaves."""
    body = json.dumps({"messages": [message], "max_tokens": 3000, "stream": True})
    with sending(server, post(len(body)), body, **options) as client:
        assert client.recv(15) == b"HTTP/1.1 200 OK"
        yield client


def all_of(client: socket.socket) -> bytes:
    """What comes until the server closes the connection, or cuts it."""
    content = b""
    try:
        while chunk := client.recv(65536):
            content += chunk
    except ConnectionResetError:
        pass
    return content


def test_every_error_is_openais_json_and_counted_once(loaded, monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("a fault of ours")

    with serve(*loaded, api_key="k") as server:
        chat = {"messages": [SHORT]}
        monkeypatch.setattr(Engine, "submit", fail)
        for status, kind, path, body, key in (
            (400, "invalid_request_error", PATH, b"{", "Bearer k"),
            (401, "authentication_error", PATH, chat, "Bearer no"),
            (404, "not_found_error", "/v1/no-such-route", None, "Bearer k"),
            (405, "invalid_request_error", PATH, None, "Bearer k"),
            (500, "server_error", PATH, chat, "Bearer k"),
        ):
            answer = server.call(path, body, authorization=key)
            error = json.loads(answer[1])["error"]
            assert (answer[0], error["type"], error["code"]) == (status, kind, status), answer
            assert error["message"] and "\n" not in error["message"]
            assert server.metric(f'requests_total{{status="{status}"}}') == 1


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "[::1", "127.0.0.1.evil"])
def test_a_name_that_a_stranger_gave_this_machine_is_refused(served, host):
    for path in ("/health", "/v1/models"):
        status, content = served.call(path, host=host)
        sentence = json.loads(content)["error"]["message"]
        assert (status, sentence.startswith(f"the host is {host!r}, and")) == (403, True)


def test_this_machines_own_names_are_taken_and_with_a_key_or_an_open_host_all(served, loaded):
    for host in ("localhost", "LOCALHOST:8080", "[::1]:80", "127.0.0.1:1"):
        assert served.call("/health", host=host)[0] == 200
    for settings in ({"api_key": "k"}, {"host": "0.0.0.0"}):
        with serve(*loaded, **settings) as server:
            assert server.call("/v1/models", host="a.example")[0] == 200


def test_the_scheme_of_a_key_has_no_case_and_a_key_that_no_header_holds_is_refused(loaded):
    with serve(*loaded, api_key="k") as server:
        for given, status in (
            ("Bearer k", 200), ("bearer k", 200), ("BEARER  k", 200),
            ("Bearer K", 401), ("Basic k", 401), ("k", 401), ("Bearer", 401), ("", 401),
        ):  # fmt: skip
            assert server.call("/v1/models", authorization=given)[0] == status, given
    for key in ("k\u00fc", "k k", "k\n"):
        with pytest.raises(UserError, match="api_key may have letters, digits and signs of ASCII"):
            settings_of(build_serve_parser(1).parse_args(["--api-key", key]))


def test_a_client_that_leaves_before_its_body_is_complete_is_counted(served):
    with sending(served, post(1000), "{"):
        pass
    wait_for(lambda: served.metric('requests_total{status="499"}') == 1)


def test_the_time_to_the_first_token_begins_with_the_first_byte(served):
    body = json.dumps({"messages": [SHORT], "max_tokens": 1}).encode()
    with sending(served, post(len(body), "connection: close")) as client:
        client.sendall(body[:9])
        time.sleep(0.3)
        client.sendall(body[9:])
        parts = json.loads(all_of(client).partition(b"\r\n\r\n")[2])["usage"]["ttft_ms"]
    assert parts["request"] >= 300 and parts["queue"] < parts["request"] <= parts["total"]


def test_a_client_that_sends_or_reads_too_slowly_is_cut(loaded, monkeypatch):
    """Half a head, a body that drips, a stream that nobody reads; then the server can end."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(connections, "SPARE_SECONDS", 0.4)
    with serve(*loaded, timeout=1.0, send_bytes=4096) as server:
        with (
            socket.create_connection(("127.0.0.1", server.port), PATIENCE) as half,
            sending(server, post(100_000)) as dripping,
            sending(server, post(100_000)) as silent,
            open_stream(server, receive_bytes=4096) as unread,
        ):
            half.sendall(b"POST /v1")
            assert all_of(half) == b""

            def are_refused_while_one_drips() -> bool:
                with suppress(OSError):  # it was refused
                    dripping.sendall(b" ")
                return server.metric('requests_total{status="408"}') == 2

            wait_for(are_refused_while_one_drips)
            answer = all_of(silent)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"the body was not complete within 1 seconds" in answer
            wait_for(lambda: server.metric("requests_running") == 0)
            assert not all_of(unread).endswith(b"data: [DONE]\n\n")
        assert text_of(server.chat(SHORT, max_tokens=3))


def test_a_body_is_checked_beside_the_servers_loop(loaded, monkeypatch):
    may_go_on, check = threading.Event(), app.parse_body

    def parse_body(content: bytes) -> Any:
        assert may_go_on.wait(PATIENCE)
        return check(content)

    monkeypatch.setattr(app, "parse_body", parse_body)
    with serve(*loaded) as server, ThreadPoolExecutor(1) as other:
        waiting = other.submit(server.chat, SHORT, max_tokens=1)
        assert server.call("/health")[0] == 200
        may_go_on.set()
        assert waiting.result()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[" + b"{}," * 600_000 + b"{}]", "the body has more than 1000000 values"),
        (b'{"messages": [' + b"{}," * 400_000 + b"{}]}", "messages"),
        (b'{"messages": [{"role": "user", "content": [' + b"{}," * 400_000 + b"{}]}]}", "messages"),
    ],
)
def test_a_body_of_very_many_values_is_refused_at_the_first(served, content, sentence):
    status, answer = served.call(PATH, content)
    message = json.loads(answer)["error"]["message"]
    assert status == 400 and message.startswith(sentence) and len(message) < 200


def test_open_requests_hold_bounded_memory(loaded, monkeypatch):
    """A picture of 67 kB, in a body of 90, is held until its prompt was read."""
    monkeypatch.setattr(app, "MAX_OPEN_BYTES", 200_000)
    message = question("a ?", noise(150, 150))
    with serve(*loaded, batch=1) as server, ThreadPoolExecutor(1) as other:
        with open_stream(server, message):
            waiting = other.submit(server.chat, message, max_tokens=2)
            wait_for(lambda: server.metric("requests_waiting") == 1)
            status, content = server.post(message)
            assert (status, content["error"]["type"]) == (429, "rate_limit_error")
            assert "hold as much memory" in content["error"]["message"]
        assert text_of(waiting.result())
        status, sentence = server.refusal(question("a ?", noise(300, 300)))
        assert (status, sentence) == (413, "what it shows takes more than 0 MB in memory")


def test_two_requests_at_once_are_decoded(loaded, monkeypatch):
    at_once, most, read = [], [], app.read_chat_request

    def read_chat_request(*arguments: Any) -> Any:
        at_once.append(1)
        most.append(len(at_once))
        time.sleep(0.05)
        at_once.pop()
        return read(*arguments)

    monkeypatch.setattr(app, "read_chat_request", read_chat_request)
    with serve(*loaded) as server, ThreadPoolExecutor(8) as clients:
        jobs = [clients.submit(server.chat, SHORT, max_tokens=1) for _ in range(8)]
        assert all(job.result() for job in jobs)
    assert max(most) == 2


def test_a_request_that_took_too_long_holds_nothing_and_keeps_its_place_for_its_thread(
    loaded, monkeypatch
):
    """Of three at once two are decoded; their threads go on when all have got their 504."""
    may_go_on, read = threading.Event(), app.read_chat_request
    started, ended = list[OpenRequest](), list[OpenRequest]()

    def read_chat_request(*arguments: Any) -> Any:
        started.append(arguments[-1])
        try:
            assert may_go_on.wait(PATIENCE)
            return read(*arguments)
        finally:
            ended.append(arguments[-1])

    monkeypatch.setattr(app, "read_chat_request", read_chat_request)
    message = question("a ?", noise(150, 150))
    with serve(*loaded, timeout=2.0) as server, ThreadPoolExecutor(3) as clients:
        waiting = [clients.submit(server.post, message) for _ in range(3)]
        assert [one.result()[0] for one in waiting] == [504] * 3
        assert len(started) == 2 and ended == []
        may_go_on.set()
        wait_for(lambda: len(ended) == 2)
        account = started[0].all
        assert (account.count, account.nbytes) == (0, 0)
        assert text_of(server.chat(message, max_tokens=1))
        wait_for(lambda: (account.count, account.nbytes) == (0, 0))


def test_more_connections_than_requests_are_refused(loaded, monkeypatch):
    monkeypatch.setattr(connections, "SPARE_CONNECTIONS", 2)
    with serve(*loaded, queue=0, batch=1) as server:
        head = ("GET /health HTTP/1.1", "host: 127.0.0.1")
        with sending(server, head), sending(server, head):
            wait_for(lambda: server.call("/health")[0] == 503)
        wait_for(lambda: server.call("/health")[0] == 200)


def test_a_refused_body_is_read_to_its_end_so_that_its_client_hears_why(loaded):
    with serve(*loaded, queue=0, batch=1) as server, open_stream(server):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        large = b" " * 20_000_000
        named = {"content-type": "application/json", "connection": "close"}
        connection.request("POST", PATH, large, named)
        assert connection.getresponse().status == 429
        connection.close()


def test_the_command_line_says_what_the_server_allows_and_hides_where_its_model_lies(tmp_path):
    parse = build_serve_parser(1).parse_args
    (tmp_path / "my-model").mkdir()
    settings = settings_of(parse(["--model", f"{tmp_path}/my-model/", "--allow-url"]))
    assert (settings.model_name, settings.allow_url) == ("my-model", True)
    settings = settings_of(parse(["--model", "someone/model", "--host", "::1"]))
    assert (settings.model_name, settings.allow_url, settings.host) == (
        "someone/model",
        False,
        "::1",
    )
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        assert connections.url_of("::1", listening) == f"http://[::1]:{port}/v1"
        assert connections.url_of("127.0.0.1", listening) == f"http://127.0.0.1:{port}/v1"
