"""Promises about hundreds of requests at once: every good one gets the answer that it gets alone.

Among them are thumbnails, broken pictures, prompts that are refused, and clients that go away.
Two hundred go to five models in one process, ours and mlx-vlm's, by threads; and forty to each of
three models of mlx-vlm's by its server in a block.
"""

import base64
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune import load, stream_generate
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.input_embeddings import PrunedEmbeddings

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
pytest.importorskip("uvicorn", reason="mlx-vlm's server needs uvicorn")
from mlx_vlm.server.runtime import runtime

from . import host_folders, llava
from .test_served import PATIENCE, Server, inside

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
FAMILIES = ["llava", "qwen2_5_vl", "qwen3_vl"]
ROOT = Path(__file__).resolve().parents[1]
TOKENS, AT_ONCE = 3, 16
GONE = "gone"  # what a client that goes away gets
BLACK = "black"  # the picture that a block refuses here


@dataclass(frozen=True)
class Ask:
    """A request: words, the name of a picture's file, and what becomes of it."""

    words: str
    picture: str | None = None
    ending: str = "answered"  # or refused, or gone


def forty_requests() -> list[Ask]:
    """Mixed: 28 good ones, 8 that are refused, 4 clients that go away."""
    words, pictures = ["w7 w9", "w30 w31 w32 w33 w34 w35"], ["a", "b", "thumb", None]
    good = [Ask(words[i // 4 % 2], pictures[i % 4]) for i in range(28)]
    bad = [Ask(words[i % 2], name, "refused") for i, name in enumerate(["broken", BLACK] * 4)]
    bad += [Ask("w5", picture, GONE) for picture in pictures]
    order = np.random.default_rng(5).permutation(40)
    return [(good + bad)[i] for i in order]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = host_folders.desk(tmp_path_factory.mktemp("many"), FAMILIES)
    host_folders.picture(folder, "thumb.png", 28, 28)
    Image.new("RGB", (60, 90)).save(folder / f"{BLACK}.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    return folder


def body(server: Server, ask: Ask, **more: Any) -> bytes:
    content: list[dict[str, Any]] = [{"type": "text", "text": ask.words}]
    if ask.picture:
        png = base64.b64encode((server.home / f"{ask.picture}.png").read_bytes()).decode()
        link = {"url": f"data:image/png;base64,{png}"}
        content.insert(0, {"type": "image_url", "image_url": link})
    request = {"model": server.model, "messages": [{"role": "user", "content": content}]}
    return json.dumps(
        {**request, "max_tokens": TOKENS, "temperature": 0, "logprobs": True, **more}
    ).encode()


def post(server: Server, ask: Ask) -> Any:
    """Log probabilities of the answer's tokens, or an error's code."""
    if ask.ending == GONE:
        return leave(server, ask)
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/chat/completions",
        body(server, ask),
        {"content-type": "application/json"},
    )
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=PATIENCE) as answer:
            (choice,) = json.loads(answer.read())["choices"]
            return tuple(token["logprob"] for token in choice["logprobs"]["content"])
    except urllib.error.HTTPError as problem:
        return problem.code


def leave(server: Server, ask: Ask) -> str:
    """Ask for a long streamed answer, and go away at its first byte."""
    content = body(server, ask, stream=True, max_tokens=200)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as client:
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        client.recv(1)
    return GONE


@pytest.fixture
def refusing_black(monkeypatch) -> None:
    """A block in which one picture's error is as any of a request."""
    prune = PrunedEmbeddings._prune

    def prune_or_refuse(self: Any, prompt: Any) -> Any:
        pixels = prompt.inputs.pixels
        if pixels is not None and (pixels == pixels.reshape(-1)[0]).all().item():
            raise UserError("a black picture shows nothing")
        return prune(self, prompt)

    monkeypatch.setattr(PrunedEmbeddings, "_prune", prune_or_refuse)


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_vlms_server_in_a_block_answers_each_as_alone(home, family, refusing_black):
    asks = forty_requests()
    with inside(home, kind=family, keep_tokens=4) as server:
        alone = {ask: post(server, ask) for ask in dict.fromkeys(asks) if ask.ending == "answered"}
        with ThreadPoolExecutor(AT_ONCE) as clients:
            together = list(clients.map(lambda ask: post(server, ask), asks))
        generator = runtime.response_generator
        assert "_gpu_embed" in vars(generator)
    assert "_gpu_embed" not in vars(generator)  # the server is as it was
    # A random model may end its answer before the last token.
    assert len(set(alone.values())) == 8 and all(isinstance(o, tuple) for o in alone.values())
    for ask, answer in zip(asks, together, strict=True):
        if ask.ending == "answered":
            np.testing.assert_allclose(answer, alone[ask], rtol=0, atol=1e-4)
        else:
            assert answer == {"refused": 500, GONE: GONE}[ask.ending], ask


OPTIONS: list[dict[str, Any]] = [
    {"pruner": "divprune", "keep_tokens": 9},  # of which a thumbnail has fewer
    {"pruner": "fastv", "keep_ratio": 0.8},
    {},
]


def answer_by_threads(folder: Path, home: Path) -> None:
    """Two hundred requests at once to five models, whose answers must be those alone."""
    folders = [None, folder, *(home / family for family in FAMILIES)]
    models = [load(folder, dtype="float32") for folder in folders]
    words = [["Is there a red star?", "What does the sign say?", "How many circles are there?"],
             ["w7 w9", "w30 w31 w32 w33 w34 w35", "w5"]]  # fmt: skip
    names = ["a", "b", "thumb", "broken", None, "a", "thumb"]
    asks = [(i % 5, words[i % 5 > 1][i % 3], names[i % 7], i % 3, i % 11 == 0) for i in range(200)]

    def answer(ask: tuple[int, str, str | None, int, bool]) -> Any:
        number, prompt, name, option, leaves = ask
        image = home / f"{name}.png" if name else None
        try:
            stream = stream_generate(
                *models[number], prompt, image, max_tokens=TOKENS, **OPTIONS[option]
            )
            if leaves:
                token = next(stream).token
                stream.close()
                return token
            return [piece.token for piece in stream]
        except UserError as problem:
            return str(problem)

    alone_of = {ask: answer(ask) for ask in dict.fromkeys(asks)}
    alone = [alone_of[ask] for ask in asks]
    refused = [text for text in alone if isinstance(text, str)]
    assert len(refused) == sum(ask[2] == "broken" for ask in asks), refused
    assert all("truncated or damaged" in text for text in refused)
    with ThreadPoolExecutor(len(asks)) as threads:
        together = list(threads.map(answer, asks))
    wrong = [(asks[i], together[i], alone[i]) for i in range(200) if together[i] != alone[i]]
    if wrong:
        sys.exit(f"{len(wrong)} wrong: {wrong[:3]}")
    os._exit(0)  # MLX 0.32.4 aborts now and then while a process with such threads ends


def test_of_two_hundred_requests_at_once_each_gets_what_it_gets_alone(home, tmp_path):
    llava.write(llava.random_model(), tmp_path / "llava")
    code = (
        "import sys; from pathlib import Path; from tests.test_many_requests import *;"
        " answer_by_threads(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "llava"), str(home)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
