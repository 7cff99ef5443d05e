"""The routes: chat completions, models, health and metrics."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from ..generation.stop_strings import StopStrings
from .answer_json import DONE, AnswerJson, error_event, usage_of
from .body import parse_body, read_bytes
from .chat_request import ChatRequest, check_links, read_chat_request
from .engine import Engine, Piece, refusal_of
from .listener import Listener, too_slow
from .metrics import CONTENT_TYPE, Metrics
from .open_requests import OpenRequest, OpenRequests
from .pictures import Downloads, download_all
from .refusals import RequestRefusedError
from .request_schema import VideoUrl
from .settings import LOOPBACK, MAX_OPEN_BYTES, ServerSettings

MOST_DECODED, MOST_DOWNLOADED = 2, 8  # requests at once
FULL = "the server has as many requests as it takes; try again later"
Value = TypeVar("Value")


class AsciiJson(JSONResponse):
    """JSON in ASCII: a sentence may quote half a character, which no encoding has."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content).encode("ascii")


class EventStream(StreamingResponse):
    """A stream that says when it has ended, also where the client left before its first event."""

    def __init__(self, events: AsyncIterator[str], end: ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.end = end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As Starlette sends it."""
        with self.end:
            await super().__call__(scope, receive, send)


class Server:
    """What the routes share."""

    def __init__(self, engine: Engine, settings: ServerSettings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.created = int(time.time())
        self.open_requests = OpenRequests(settings.most_requests, MAX_OPEN_BYTES)
        self.decoding = asyncio.Semaphore(MOST_DECODED)
        self.decoding_clips = asyncio.Semaphore(1)  # which can take long, so pictures do not wait
        self.downloading = asyncio.Semaphore(MOST_DOWNLOADED)

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions: the answer, or its stream once there is a first piece; until
        then it can be refused."""
        with ExitStack() as end:
            if self.open_requests.is_full:
                refused = OpenRequest(self.open_requests, self.settings.timeout)
                await in_time(read_bytes(request, None), refused, "body", 408)
                raise RequestRefusedError(FULL, 429)
            open_request = end.enter_context(self.open_requests.open(self.settings.timeout))
            reading = in_time(read_bytes(request, open_request), open_request, "body", 408)
            chat = await in_time(self._read(await reading, open_request), open_request)
            listener = Listener(request, self.engine, chat, open_request)
            end.callback(listener.close)
            first = await listener.next()
            chat.forget_pictures()
            open_request.hold(0)
            if not chat.is_stream:
                return await self._whole(listener, chat, first)
            end.callback(self._count_stream, listener)
            return EventStream(self._stream(listener, chat, first), end.pop_all())

    async def _read(self, content: bytes, open_request: OpenRequest) -> ChatRequest:
        """A request with what it shows, read in threads; few requests at once, as each may take a
        gigabyte."""
        body = await in_thread(self.decoding, parse_body, content)
        links, settings, downloads = body.links, self.settings, Downloads()
        check_links(links, settings)
        if settings.allow_url:
            downloads = await in_thread(
                self.downloading, lambda: download_all(links, open_request.seconds_left)
            )
            open_request.hold(len(content) + sum(map(len, downloads.values())))
        has_clip = any(isinstance(link, VideoUrl) for link in links)
        places = self.decoding_clips if has_clip else self.decoding
        return await in_thread(
            places, read_chat_request, body, downloads, settings, open_request
        )  # fmt: skip

    async def _whole(self, listener: Listener, chat: ChatRequest, piece: Piece) -> Response:
        """The answer in one piece."""
        stop, texts = StopStrings(chat.stop), list[str]()
        while True:
            reason = piece.response.finish_reason
            texts.append(stop.add(piece.response.text, reason is not None))
            if stop.is_found or reason:
                break
            piece = await listener.next()
        self.metrics.requests["200"] += 1
        reason = "stop" if stop.is_found else str(reason)
        answer = AnswerJson(self.settings.model_name)
        content = answer.completion("".join(texts), reason, usage_of(piece), chat.notes.warnings)
        return AsciiJson(content)

    async def _stream(
        self, listener: Listener, chat: ChatRequest, piece: Piece
    ) -> AsyncIterator[str]:
        """The answer as events; one that ends early ends with an error."""
        answer, stop = AnswerJson(self.settings.model_name), StopStrings(chat.stop)
        warnings = chat.notes.warnings
        try:
            yield answer.chunk({"role": "assistant", "content": ""})
            while True:
                reason = piece.response.finish_reason
                text = stop.add(piece.response.text, reason is not None)
                reason = "stop" if stop.is_found else reason
                if text:
                    yield answer.chunk({"content": text})
                if reason:
                    break
                piece = await listener.next()
            yield answer.chunk({}, reason, warnings)
            if chat.with_usage:
                yield answer.usage_chunk(usage_of(piece), warnings)
            yield DONE
            listener.status = 200
        except Exception as problem:
            refusal = refusal_of(problem)
            listener.status = refusal.status
            yield error_event(refusal)

    def _count_stream(self, listener: Listener) -> None:
        """Count a stream, however it ended."""
        self.metrics.requests[str(listener.status)] += 1

    async def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [self._model()]}

    async def model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/NAME."""
        if name != self.settings.model_name:
            known = self.settings.model_name
            raise RequestRefusedError(f"there is no model {name!r}; it is {known!r}", 404, "model")
        return self._model()

    def _model(self) -> dict[str, Any]:
        name = self.settings.model_name
        return {"id": name, "object": "model", "created": self.created, "owned_by": "mlx_vlm_prune"}

    async def health(self) -> Response:
        """GET /health: 200 while requests are answered."""
        is_alive = self.engine.is_alive
        content = {
            "status": "ok" if is_alive else "failed",
            "waiting": len(self.engine.waiting),
            "running": len(self.engine.running),
        }
        return AsciiJson(content, 200 if is_alive else 503)

    async def metrics_text(self) -> Response:
        """GET /metrics."""
        text = self.metrics.text(len(self.engine.waiting), len(self.engine.running))
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    async def check_host(self, request: Request) -> None:
        """Raises RequestRefusedError for a name of this machine that a stranger may have given it:
        a page whose own name leads to 127.0.0.1 could else use the server."""
        if self.settings.api_key or self.settings.host not in LOOPBACK:
            return
        host = request.headers.get("host", "")
        if _name_of(host) not in LOOPBACK:
            raise RequestRefusedError(
                f"the host is {host[:100]!r}, and this server is for {LOOPBACK[0]} and"
                f" {LOOPBACK[1]}; with an API key it is for all",
                403,
            )

    async def check_key(self, request: Request) -> None:
        """Raises RequestRefusedError without the server's key."""
        key = self.settings.api_key
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_right = scheme.lower() == "bearer" and hmac.compare_digest(
            given.strip().encode(), (key or "").encode()
        )
        if key and not is_right:
            raise RequestRefusedError("the API key is missing or wrong", 401)

    async def refuse(self, _: Request, problem: Any) -> Response:
        """A refusal as OpenAI's JSON, counted; also the framework's, as of a path that is not
        there, and a fault of ours."""
        if status := getattr(problem, "status_code", None):
            refusal = RequestRefusedError(str(problem.detail), status)
        else:
            refusal = refusal_of(problem)
        self.metrics.requests[str(refusal.status)] += 1
        return AsciiJson(refusal.as_json, refusal.status)


async def in_time(
    work: Awaitable[Value], open_request: OpenRequest, part: str = "answer", status: int = 504
) -> Value:
    """A part of a request or of its answer, if it is there in time. Raises RequestRefusedError."""
    try:
        return await asyncio.wait_for(work, open_request.seconds_left)
    except asyncio.TimeoutError:
        raise too_slow(open_request, part, status) from None


async def in_thread(
    places: asyncio.Semaphore, work: Callable[..., Value], *arguments: Any
) -> Value:
    """The result of a call in a thread. It has its place until the thread has ended, also where
    nobody waits any more."""
    await places.acquire()
    call = asyncio.ensure_future(run_in_threadpool(work, *arguments))

    def give_place_back(ended: "asyncio.Task[Value]") -> None:
        places.release()
        if not ended.cancelled():
            ended.exception()  # else asyncio writes of one that nobody has seen

    call.add_done_callback(give_place_back)
    await asyncio.wait({call})  # which, unlike `await call`, ends no call when it is cancelled
    return call.result()


def build_app(engine: Engine, settings: ServerSettings, metrics: Metrics) -> FastAPI:
    """The application; the engine's thread runs as long as it does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.stop)

    server = Server(engine, settings, metrics)
    app = FastAPI(
        lifespan=lifespan, dependencies=[Depends(server.check_host)],
        docs_url=None, redoc_url=None, openapi_url=None,
    )  # fmt: skip

    api = APIRouter(prefix="/v1", dependencies=[Depends(server.check_key)])
    raw: dict[str, Any] = {"response_model": None}
    api.add_api_route("/chat/completions", server.chat_completions, methods=["POST"], **raw)
    api.add_api_route("/models", server.models, **raw)
    api.add_api_route("/models/{name:path}", server.model, **raw)
    app.include_router(api)
    app.add_api_route("/health", server.health, **raw)
    app.add_api_route("/metrics", server.metrics_text, **raw)
    for problem in (RequestRefusedError, 404, 405, Exception):
        app.add_exception_handler(problem, server.refuse)
    return app


def _name_of(host: str) -> str | None:
    """A host's name without its port; None where it is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
