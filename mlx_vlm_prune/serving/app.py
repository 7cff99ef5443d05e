"""The routes: chat completions, models, health and metrics."""

import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from ..checkpoints.reading.files import parse_json
from ..generation.stop_strings import StopStrings
from .answer_json import DONE, AnswerJson, error_event, usage_of
from .chat_request import ChatRequest, read_chat_request
from .engine import Engine, Piece
from .listener import Listener
from .metrics import CONTENT_TYPE, Metrics
from .refusals import RequestRefusedError
from .request_schema import ChatBody, read_body
from .settings import MAX_BODY_BYTES, ServerSettings

JSON = "application/json"
MOST_DRAINED_BYTES = 4 * MAX_BODY_BYTES  # read of a body that is too large, so that its client,
# which sends it all before it listens, gets to know why it is refused


class AsciiJson(JSONResponse):
    """JSON in ASCII: a sentence may quote half a character, which no encoding has."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content).encode("ascii")


class EventStream(StreamingResponse):
    """A stream that says when it has ended, also where the client left before its first event."""

    def __init__(self, server: "Server", listener: Listener, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.server, self.listener = server, listener

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As Starlette sends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.server.end_stream(self.listener)


class Server:
    """What the routes share."""

    def __init__(self, engine: Engine, settings: ServerSettings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.created, self.open_requests = int(time.time()), 0

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        if self.open_requests >= self.settings.queue + self.settings.batch:
            raise self._count(RequestRefusedError("the server has as many requests as it takes;"
                                                  " try again later", 429))  # fmt: skip
        self.open_requests += 1
        try:
            body = read_body(await read_json(request))
            chat = await run_in_threadpool(read_chat_request, body, self.settings)
            return await self._answer(request, body, chat)
        except RequestRefusedError as refusal:
            raise self._count(refusal) from None
        finally:
            self.open_requests -= 1

    def _count(self, refusal: RequestRefusedError) -> RequestRefusedError:
        self.metrics.requests[str(refusal.status)] += 1
        return refusal

    async def _answer(self, request: Request, body: ChatBody, chat: ChatRequest) -> Response:
        """The answer, or its stream once there is a first piece: until then it can be refused."""
        listener = Listener(request, self.engine, chat, self.settings.timeout)
        try:
            first = await listener.next()
            if not body.stream:
                return await self._whole(listener, chat, first)
        except BaseException:
            listener.close()
            raise
        options = body.stream_options
        with_usage = bool(options and options.include_usage)
        self.open_requests += 1
        return EventStream(self, listener, self._stream(listener, chat, first, with_usage))

    async def _whole(self, listener: Listener, chat: ChatRequest, piece: Piece) -> Response:
        """The answer in one piece."""
        stop, texts = StopStrings(chat.stop), list[str]()
        while True:
            reason = piece.response.finish_reason
            texts.append(stop.add(piece.response.text, reason is not None))
            if stop.is_found or reason:
                break
            piece = await listener.next()
        listener.close()
        self.metrics.requests["200"] += 1
        reason = "stop" if stop.is_found else str(reason)
        answer = AnswerJson(self.settings.model_name)
        content = answer.completion("".join(texts), reason, usage_of(piece), chat.notes.warnings)
        return AsciiJson(content)

    async def _stream(
        self, listener: Listener, chat: ChatRequest, piece: Piece, with_usage: bool
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
            if with_usage:
                yield answer.usage_chunk(usage_of(piece), warnings)
            yield DONE
            listener.status = 200
        except RequestRefusedError as refusal:
            listener.status = refusal.status
            yield error_event(refusal)

    def end_stream(self, listener: Listener) -> None:
        """Count a stream, however it ended."""
        listener.close()
        self.open_requests -= 1
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

    def check_key(self, request: Request) -> None:
        """Raises RequestRefusedError without the server's key."""
        key = self.settings.api_key
        given = request.headers.get("authorization", "")
        if key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise RequestRefusedError("the API key is missing or wrong", 401)


def build_app(engine: Engine, settings: ServerSettings, metrics: Metrics) -> FastAPI:
    """The application; the engine's thread runs as long as it does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.stop)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    server = Server(engine, settings, metrics)

    api = APIRouter(prefix="/v1", dependencies=[Depends(server.check_key)])
    raw: dict[str, Any] = {"response_model": None}
    api.add_api_route("/chat/completions", server.chat_completions, methods=["POST"], **raw)
    api.add_api_route("/models", server.models, **raw)
    api.add_api_route("/models/{name:path}", server.model, **raw)
    app.include_router(api)
    app.add_api_route("/health", server.health, **raw)
    app.add_api_route("/metrics", server.metrics_text, **raw)
    app.add_exception_handler(RequestRefusedError, refused)
    app.add_exception_handler(HTTPException, refused)
    return app


def refused(_: Request, problem: Any) -> Response:
    """A refusal as JSON; also one of the framework's, as of a path that is not there."""
    if isinstance(problem, RequestRefusedError):
        return AsciiJson(problem.as_json, problem.status)
    refusal = RequestRefusedError(str(problem.detail), problem.status_code)
    return AsciiJson(refusal.as_json, refusal.status)


async def read_json(request: Request) -> Any:
    """The body's JSON, of MAX_BODY_BYTES at most. Raises RequestRefusedError.

    A page in a browser can send other kinds of content to any server without leave.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
        raise RequestRefusedError(f"the content-type must be {JSON}", 415)
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            body += chunk
        elif size > MOST_DRAINED_BYTES:
            break
    if size > MAX_BODY_BYTES:
        most = MAX_BODY_BYTES // 1_000_000
        raise RequestRefusedError(f"the body is larger than {most} MB", 413)
    try:
        return await run_in_threadpool(parse_json, bytes(body))
    except ValueError as problem:
        raise RequestRefusedError(f"the body {problem}") from None
