"""A request's body: JSON of bounded size, read as it comes and checked in a thread."""

from fastapi import Request

from ..checkpoints.reading.files import parse_json
from .open_requests import OpenRequest
from .refusals import RequestRefusedError, client_gone
from .request_schema import ChatBody, check_body
from .settings import MAX_BODY_BYTES

JSON = "application/json"
TOO_LARGE = f"the body is larger than {MAX_BODY_BYTES // 1_000_000} MB"
# Read of a body that is refused, so that its client, which sends it all before it listens, gets to
# know why.
MOST_DRAINED_BYTES = 4 * MAX_BODY_BYTES
# Each value of JSON has one of these before or behind it. 64 MB of "{}," are 21 million objects
# of Python's, in gigabytes.
VALUE_MARKS, MOST_VALUES = (b",", b"{", b"["), 1_000_000


async def read_bytes(request: Request, open_request: OpenRequest | None) -> bytes:
    """The body, of MAX_BODY_BYTES at most; without a place among the open requests it is read and
    thrown away. Raises RequestRefusedError.

    A page in a browser can send other kinds of content to any server without leave.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
        raise RequestRefusedError(f"the content-type must be {JSON}", 415)
    body, size, refusal = bytearray(), 0, None
    while size <= MOST_DRAINED_BYTES:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise client_gone()
        chunk = message.get("body", b"")
        size += len(chunk)
        if open_request and not refusal:
            body += chunk
            try:
                if size > MAX_BODY_BYTES:
                    raise RequestRefusedError(TOO_LARGE, 413)
                open_request.hold(size)
            except RequestRefusedError as problem:
                refusal = problem
                body.clear()
                open_request.hold(0)
        if not message.get("more_body", False):
            break
    if refusal:
        raise refusal
    return bytes(body)


def parse_body(content: bytes) -> ChatBody:
    """The request in a body. Raises RequestRefusedError. Of 64 MB it takes seconds."""
    if sum(content.count(mark) for mark in VALUE_MARKS) > MOST_VALUES:
        raise RequestRefusedError(f"the body has more than {MOST_VALUES} values")
    try:
        return check_body(parse_json(content))
    except ValueError as problem:
        raise RequestRefusedError(f"the body {problem}") from None
