"""uvicorn's connections, none of which stays open for a client that sends or reads too slowly."""

import asyncio
import math
import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from .settings import ServerSettings

HEAD_SECONDS = 20.0  # until a request's head must be there
SPARE_SECONDS = 2.0  # beyond an answer's time, for the sentence that says that it took too long
SPARE_CONNECTIONS = 64  # beside those of the requests that may wait: for /health and refusals


class TimedConnection(H11Protocol):
    """A connection that is cut where it idles, or `seconds` after a request's head: uvicorn itself
    waits without end for a body that drips in, and for an answer that nobody reads."""

    seconds = 600.0
    end: asyncio.TimerHandle | None = None

    # uvicorn narrows asyncio's type of a transport in the same way.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._allow(HEAD_SECONDS)

    def handle_events(self) -> None:
        """Something has come, perhaps the rest of a request's head."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._allow(self.seconds + SPARE_SECONDS)

    def on_response_complete(self) -> None:
        """An answer was written, which the client may still have to read."""
        self._allow(HEAD_SECONDS)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client or the server has closed it."""
        if self.end:
            self.end.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server ends: a request whose body is not there gets a moment more."""
        super().shutdown()
        if self.cycle is not None and self.cycle.more_body:
            self._allow(SPARE_SECONDS)

    def _allow(self, seconds: float) -> None:
        """Cut the connection in so many seconds, unless something else happens first."""
        if self.end:
            self.end.cancel()
        self.end = self.loop.call_later(seconds, self.transport.abort)


def build_uvicorn(app: FastAPI, settings: ServerSettings) -> uvicorn.Server:
    """uvicorn for an application, with our limits of time and connections.

    After a signal to end, what is answered has `settings.timeout` seconds.
    """
    connection = type("Connection", (TimedConnection,), {"seconds": settings.timeout})
    config = uvicorn.Config(
        app, http=connection, ws="none", lifespan="on", log_level="warning", server_header=False,
        limit_concurrency=settings.most_requests + SPARE_CONNECTIONS,
        timeout_graceful_shutdown=math.ceil(settings.timeout + 2 * SPARE_SECONDS),
    )  # fmt: skip
    return uvicorn.Server(config)


def url_of(host: str, listening: socket.socket) -> str:
    """Where clients find the API."""
    place = f"[{host}]" if ":" in host else host
    return f"http://{place}:{listening.getsockname()[1]}/v1"
