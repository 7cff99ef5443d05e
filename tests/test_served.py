"""Promises of mlx-vlm's HTTP server: it answers pruned, from a `prune-into` folder and in a block.

The server is the real one, on 127.0.0.1. Its log probabilities are compared with those of mlx-vlm's
`stream_generate` inside `pruned`, on the folder that was not pruned, its words with `generate`'s.
"""

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from mlx_vlm_prune import generate, load, pruned
from mlx_vlm_prune.hosts.pruned_folder import prune_into

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
pytest.importorskip("uvicorn", reason="mlx-vlm's server needs uvicorn")
from . import host_folders

KIND = "qwen3_vl"
METHOD, RATIO = "divprune", 0.25
TOKENS = 6
PATIENCE = 120  # seconds until a server must answer at all
PAGE = Path(__file__).resolve().parents[1] / "docs" / "mlx-vlm.md"
WORD = re.compile(r"\bw\d+\b")
Logprobs = list[float]  # log probabilities of an answer's tokens


@dataclass(frozen=True)
class Question:
    """A question, and the name of a picture."""

    words: str
    picture: str | None = None


QUESTIONS = [
    Question("w7 w9", "a"),
    Question("w7 w9", "b"),
    Question("w3 w11 w4 w8", "a"),
    Question("w7 w9 w11"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = host_folders.desk(tmp_path_factory.mktemp("served"), [KIND])
    prune_into(folder / KIND, folder / "pruned", METHOD, RATIO, None)
    prune_into(folder / KIND, folder / "attended", "received_attention", RATIO, None)
    return folder


@pytest.fixture(scope="module")
def whole(home) -> tuple[Any, Any]:
    return load(home / KIND)


@dataclass(frozen=True)
class Server:
    """One that runs, and the model that it was started with."""

    port: int
    model: str
    home: Path

    def post(self, question: Question, **more: Any) -> dict[str, Any]:
        """The answer to a question as OpenAI's clients ask it, a picture as its bytes."""
        content: list[dict[str, Any]] = [{"type": "text", "text": question.words}]
        if question.picture:
            png = base64.b64encode((self.home / f"{question.picture}.png").read_bytes()).decode()
            link = {"url": f"data:image/png;base64,{png}"}
            content.insert(0, {"type": "image_url", "image_url": link})
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": TOKENS, "temperature": 0, "logprobs": True, **more}
        return json.loads(self.call("/v1/chat/completions", json.dumps(body).encode()))

    def call(self, path: str, body: bytes | None = None) -> bytes:
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=PATIENCE) as answer:
                return answer.read()
        except urllib.error.HTTPError as problem:
            raise AssertionError(f"{problem.code}: {problem.read().decode()}") from None

    def logprobs(self, question: Question) -> Logprobs:
        (choice,) = self.post(question)["choices"]
        return [token["logprob"] for token in choice["logprobs"]["content"]]

    def logprobs_at_once(self, questions: list[Question]) -> list[Logprobs]:
        with ThreadPoolExecutor(len(questions)) as clients:
            return list(clients.map(self.logprobs, questions))

    def wait(self, is_alive: Any) -> None:
        """Until it answers."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.call("/health")
                return
            except OSError:
                assert is_alive() and time.monotonic() < deadline, "the server does not come up"
                time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def command(home: Path, name: str, **settings: str) -> Iterator[Server]:
    """As docs/mlx-vlm.md starts it."""
    server = Server(free_port(), str(home / name), home)
    (line,) = re.findall(r"^python -m mlx_vlm\.server .*$", PAGE.read_text(encoding="utf-8"), re.M)
    replacements = {
        "python": sys.executable,
        "my-vlm-pruned": server.model,
        "8080": str(server.port),
    }
    words = [replacements.pop(word, word) for word in line.split()]
    assert not replacements, f"the page's server needs {replacements}"
    with (home / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            words, cwd=home, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            server.wait(lambda: process.poll() is None)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def folder_server(home) -> Iterator[Server]:
    with command(home, "pruned") as server:
        yield server


def expected(
    home: Path, whole: tuple[Any, Any], question: Question, method: str | None = METHOD
) -> Logprobs:
    """Of mlx-vlm's `stream_generate`, in a block that prunes if there is a method."""
    from mlx_vlm import apply_chat_template, stream_generate

    model, processor = whole
    picture = str(home / f"{question.picture}.png") if question.picture else None
    text = apply_chat_template(processor, model.config, question.words, num_images=bool(picture))
    options = {"image": picture, "max_tokens": TOKENS, "temperature": 0.0}
    with ExitStack() as block:
        if method:
            block.enter_context(pruned(model, method, keep_ratio=RATIO))
        pieces = list(stream_generate(model, processor, text, **options))
    # Of the last piece the token is that of the one before it.
    return [float(piece.logprobs[piece.token]) for piece in pieces[:TOKENS]]


def assert_same(logprobs: Logprobs, wanted: Logprobs) -> None:
    assert len(logprobs) == len(wanted) == TOKENS
    np.testing.assert_allclose(logprobs, wanted, rtol=0, atol=1e-4)


def test_a_folder_that_prunes_is_served_pruned(folder_server, home, whole):
    for question in QUESTIONS:
        logprobs = folder_server.logprobs(question)
        assert_same(logprobs, expected(home, whole, question))
        if question.picture:  # so something was pruned
            assert np.abs(np.subtract(logprobs, expected(home, whole, question, None))).max() > 1e-3
    assert folder_server.logprobs(QUESTIONS[0]) != folder_server.logprobs(QUESTIONS[1])


def test_its_words_are_those_of_our_own_path_and_of_mlx_vlms_generate(folder_server, home, whole):
    from mlx_vlm import apply_chat_template
    from mlx_vlm import generate as theirs
    from mlx_vlm.utils import load as load_theirs

    picture = str(home / "a.png")
    options = {"pruner": METHOD, "keep_ratio": RATIO, "max_tokens": TOKENS}
    ours = generate(*whole, "w7 w9", image=picture, **options)
    model, processor = load_theirs(str(home / "pruned"))
    text = apply_chat_template(processor, model.config, "w7 w9", num_images=1)
    alone = theirs(model, processor, text, image=picture, max_tokens=TOKENS, temperature=0.0)
    answer = folder_server.post(Question("w7 w9", "a"))
    (choice,) = answer["choices"]
    assert choice["message"]["content"].strip() == ours.text.strip() == alone.text.strip()
    assert ours.visual_tokens_kept < ours.visual_tokens
    assert answer["usage"]["prompt_tokens"] == alone.prompt_tokens  # it counts ids, as ever


def test_requests_that_come_together_are_answered_as_alone(folder_server, home, whole):
    wanted = [expected(home, whole, question) for question in QUESTIONS]
    for order in ([0, 1, 2, 3], [3, 0], [1, 3, 0], [0, 1]):
        for logprobs, i in zip(
            folder_server.logprobs_at_once([QUESTIONS[i] for i in order]), order, strict=True
        ):
            assert_same(logprobs, wanted[i])


def test_requests_join_one_that_is_being_answered(folder_server, home, whole):
    with ThreadPoolExecutor(1) as other:
        long = other.submit(folder_server.post, QUESTIONS[0], max_tokens=60)
        for logprobs, question in zip(
            folder_server.logprobs_at_once(QUESTIONS), QUESTIONS, strict=True
        ):
            assert_same(logprobs, expected(home, whole, question))
        (choice,) = long.result()["choices"]
    assert_same([x["logprob"] for x in choice["logprobs"]["content"]][:TOKENS],
         expected(home, whole, QUESTIONS[0]))  # fmt: skip


def test_a_streamed_answer_is_the_same(folder_server):
    options = {"stream": True, "logprobs": False}
    body = {"model": folder_server.model, "max_tokens": TOKENS, "temperature": 0, **options}
    body["messages"] = [{"role": "user", "content": QUESTIONS[3].words}]
    lines = folder_server.call("/v1/chat/completions", json.dumps(body).encode()).decode()
    pieces = [json.loads(line[6:]) for line in lines.splitlines() if line.startswith("data: {")]
    text = "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces
                   if piece["choices"])  # fmt: skip
    assert text == folder_server.post(QUESTIONS[3])["choices"][0]["message"]["content"] != ""


def test_with_its_prefix_cache_on_nothing_stale_is_read(home, whole):
    """Each question twice, and the next turn of each: found by ids, there would be rows amiss."""
    settings = {"APC_ENABLED": "1", "APC_BLOCK_SIZE": "4", "APC_DISK_ENABLED": "0"}
    with command(home, "attended", **settings) as server:
        assert json.loads(server.call("/health"))["apc_enabled"]
        for question in [*QUESTIONS, Question("w7 w9 w5 w3", "a"), *QUESTIONS]:
            assert_same(
                server.logprobs(question), expected(home, whole, question, "received_attention")
            )
        assert json.loads(server.call("/v1/cache/stats"))["lookups_hit"] == 0


@contextmanager
def inside(
    home: Path, method: str = METHOD, kind: str = KIND, keep_tokens: int | None = None
) -> Iterator[Server]:
    """mlx-vlm's app in this process, as docs/mlx-vlm.md starts it."""
    import uvicorn
    from mlx_vlm.server import app, get_cached_model, unload_model_sync

    server = Server(free_port(), str(home / kind), home)
    model, processor, _ = get_cached_model(server.model)
    app_server = uvicorn.Server(uvicorn.Config(app, port=server.port, log_level="warning"))
    ratio = RATIO if keep_tokens is None else None
    budget = {"keep_ratio": ratio, "keep_tokens": keep_tokens}
    with pruned(model, method, processor=processor, **budget) as report:
        thread = Thread(target=app_server.run, daemon=True)
        thread.start()
        try:
            server.wait(thread.is_alive)
            yield server
        finally:
            app_server.should_exit = True
            thread.join(PATIENCE)
            unload_model_sync()
    assert report.prompts and report.kept < report.total


def test_in_a_block_the_server_prunes(home, whole):
    wanted = [expected(home, whole, question) for question in QUESTIONS]
    with inside(home) as server:
        for question, odds in zip(QUESTIONS, wanted, strict=True):
            assert_same(server.logprobs(question), odds)
        for logprobs, odds in zip(server.logprobs_at_once(QUESTIONS), wanted, strict=True):
            assert_same(logprobs, odds)


def test_in_a_block_with_restore_the_servers_answers_are_those_of_generate(home, whole):
    method = f"{METHOD}+restore"
    wanted = [expected(home, whole, question, method) for question in QUESTIONS]
    options = {"pruner": method, "keep_ratio": RATIO, "max_tokens": TOKENS}
    ours = [
        generate(*whole, question.words, str(home / f"{question.picture}.png"), **options).text
        for question in QUESTIONS[:3]
    ]
    assert np.abs(np.subtract(wanted[0], expected(home, whole, QUESTIONS[0]))).max() > 1e-3
    with inside(home, method) as server:
        for question, odds in zip(QUESTIONS, wanted, strict=True):
            assert_same(server.logprobs(question), odds)
        for logprobs, odds in zip(server.logprobs_at_once(QUESTIONS), wanted, strict=True):
            assert_same(logprobs, odds)
        for question, text in zip(QUESTIONS[:3], ours, strict=True):
            (choice,) = server.post(question)["choices"]
            assert choice["message"]["content"].strip() == text.strip() != ""


def spoken(home: Path, whole: tuple[Any, Any], questions: list[str]) -> list[str]:
    """The words of a conversation about a picture, each turn read from its beginning."""
    from mlx_vlm import apply_chat_template
    from mlx_vlm import generate as theirs

    model, processor = whole
    history: list[dict[str, Any]] = []
    words: list[str] = []

    def add(role: str, text: str) -> None:
        history.append({"role": role, "content": [{"type": "text", "text": text}]})

    with pruned(model, METHOD, keep_ratio=RATIO):
        for question in questions:
            add("user", question)
            text = apply_chat_template(processor, model.config, history, num_images=1)
            picture = str(home / "a.png")
            answer = theirs(model, processor, text, picture, max_tokens=TOKENS, temperature=0.0)
            add("assistant", answer.text)
            words += WORD.findall(answer.text)
    return words


def test_mlx_vlms_chat_answers_turn_after_turn(home, whole):
    questions = ["w7 w9", "w11 w3", "w8"]
    words = [sys.executable, "-m", "mlx_vlm.chat", "--model", str(home / "pruned")]
    words += ["--temperature", "0", "--max-tokens", str(TOKENS), "--no-verbose"]
    typed = "\n".join([f"/image {home / 'a.png'}", *questions, "/exit", ""])
    done = subprocess.run(
        words, input=typed, cwd=home, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0 and "Error" not in done.stdout, done.stderr[-3000:]
    wanted = spoken(home, whole, questions)
    assert len(wanted) > TOKENS and WORD.findall(done.stdout) == wanted
