"""A request's side of the queue: its events in the server's loop, until it is answered or gone."""

import asyncio
from contextlib import suppress

from fastapi import Request

from .chat_request import ChatRequest
from .engine import Engine, Event, Job, Piece
from .open_requests import OpenRequest
from .refusals import CLIENT_GONE, RequestRefusedError, client_gone


class Listener:
    """Waits for the pieces of one answer. A client that leaves cancels it."""

    def __init__(
        self, request: Request, engine: Engine, chat: ChatRequest, open_request: OpenRequest
    ) -> None:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def deliver(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        self.engine, self.events, self.open_request = engine, events, open_request
        self.job = Job(chat, deliver, 1000 * open_request.age)
        self.status = CLIENT_GONE  # of a stream, until it ends otherwise
        engine.submit(self.job)
        self.gone = asyncio.ensure_future(self._watch(request))

    async def next(self) -> Piece:
        """The next piece. Raises RequestRefusedError where there is none any more."""
        waiting = asyncio.ensure_future(self.events.get())
        try:
            await asyncio.wait(
                {waiting, self.gone},
                timeout=self.open_request.seconds_left,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if waiting.done():
                event = waiting.result()
            elif self.gone.done():
                raise client_gone()
            else:
                raise too_slow(self.open_request)
        finally:
            waiting.cancel()
        if isinstance(event, RequestRefusedError):
            raise event
        return event

    def close(self) -> None:
        """Nobody listens any more: what is not written yet is cancelled."""
        self.gone.cancel()
        self.engine.cancel(self.job)

    async def _watch(self, request: Request) -> None:
        """Until the client leaves."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.engine.cancel(self.job)


def too_slow(
    open_request: OpenRequest, part: str = "answer", status: int = 504
) -> RequestRefusedError:
    """For a body or an answer that is not complete in time."""
    sentence = f"the {part} was not complete within {open_request.seconds:g} seconds"
    return RequestRefusedError(sentence, status)
