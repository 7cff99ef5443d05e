"""A server on the loopback in a thread, and requests to it by OpenAI's own client or as bytes."""

import base64
import io
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the server needs FastAPI")
pytest.importorskip("uvicorn", reason="the server needs uvicorn")

from mlx_vlm_prune.serving.build import build_server
from mlx_vlm_prune.serving.connections import build_uvicorn
from mlx_vlm_prune.serving.settings import ServerSettings

PATIENCE = 60  # seconds until an answer must be there at all


def data_uri(picture: Image.Image, kind: str = "PNG") -> str:
    """A picture as requests bring it."""
    file = io.BytesIO()
    picture.save(file, format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture that no other seed has."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def question(text: str, *pictures: Image.Image, **image_options: str) -> dict[str, Any]:
    """A message of the user's."""
    links = [{"url": data_uri(picture), **image_options} for picture in pictures]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": link} for link in links]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def answer(text: str) -> dict[str, Any]:
    """A message of the assistant's."""
    return {"role": "assistant", "content": text}


@dataclass(frozen=True)
class Served:
    """A server that runs, and its app's port."""

    port: int
    key: str | None = None

    def call(self, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        """Status and content; a body that is no bytes is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        named = {"content-type": "application/json"}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        if self.key and "authorization" not in named:
            named["authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, named)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=PATIENCE) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as problem:
            with problem:
                return problem.code, problem.read()

    def chat(self, *messages: dict[str, Any], **more: Any) -> dict[str, Any]:
        """The answer, which must be one."""
        status, content = self.post(*messages, **more)
        assert status == 200, content
        return content

    def post(self, *messages: dict[str, Any], **more: Any) -> tuple[int, Any]:
        """Status and JSON of the answer or of the refusal."""
        status, content = self.call("/v1/chat/completions", {"messages": messages, **more})
        return status, json.loads(content)

    def refusal(self, *messages: dict[str, Any], **more: Any) -> tuple[int, str]:
        """Status and sentence of a refusal, which must be one of the client's fault."""
        status, content = self.post(*messages, **more)
        assert 400 <= status < 500, content
        return status, content["error"]["message"]

    def metric(self, name: str) -> float:
        """A figure of /metrics; 0 of a label that never was."""
        _, text = self.call("/metrics")
        lines = [line.rpartition(" ") for line in text.decode().splitlines()]
        values = [float(value) for key, _, value in lines if key == f"mlx_vlm_prune_{name}"]
        return values[0] if values or "{" not in name else 0.0


def text_of(completion: dict[str, Any]) -> str:
    """The words of an answer."""
    (choice,) = completion["choices"]
    return str(choice["message"]["content"])


def slow_down(batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a batch that take as long as those of a model that is no toy."""
    step = batch.step

    def slow(self: Any) -> Any:
        time.sleep(0.02)
        return step(self)

    monkeypatch.setattr(batch, "step", slow)


@contextmanager
def serve(model: Any, processor: Any, *, send_bytes: int = 0, **settings: Any) -> Iterator[Served]:
    """A server of these settings until the end of the block; with `send_bytes` the kernel holds no
    more of an answer that is not read."""
    checked = ServerSettings(**{"model_name": "tiny", "timeout": PATIENCE, **settings})
    app = build_server(model, processor, checked)
    with socket.socket() as listening:
        if send_bytes:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        server = build_uvicorn(app, checked)
        thread = Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server does not come up"
                thread.join(0.01)
            yield Served(port, checked.api_key)
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the server does not end"
