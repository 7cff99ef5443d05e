"""A request's side of the queue: its events in the server's loop, until it is answered or gone."""

import asyncio
from contextlib import suppress

from fastapi import Request

from .chat_request import ChatRequest
from .engine import Engine, Event, Job, Piece
from .refusals import RequestRefusedError

CLIENT_GONE = 499  # as nginx counts them; nobody gets this answer


class Listener:
    """Waits for the pieces of one answer. A client that leaves cancels it."""

    def __init__(self, request: Request, engine: Engine, chat: ChatRequest, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def deliver(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        self.engine, self.job, self.events = engine, Job(chat, deliver), events
        self.status = CLIENT_GONE  # of a stream, until it ends otherwise
        self.timeout, self.deadline = timeout, loop.time() + timeout
        engine.submit(self.job)
        self.gone = asyncio.ensure_future(self._watch(request))

    async def next(self) -> Piece:
        """The next piece. Raises RequestRefusedError where there is none any more."""
        waiting = asyncio.ensure_future(self.events.get())
        left = self.deadline - asyncio.get_running_loop().time()
        try:
            await asyncio.wait(
                {waiting, self.gone}, timeout=max(0, left), return_when=asyncio.FIRST_COMPLETED
            )
            if waiting.done():
                event = waiting.result()
            elif self.gone.done():
                raise RequestRefusedError("the client has left", CLIENT_GONE)
            else:
                sentence = f"the answer was not complete within {self.timeout:g} seconds"
                raise RequestRefusedError(sentence, 504)
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
