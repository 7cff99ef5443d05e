"""Does the server keep its promises under load? `python -m benchmarks.serving_load`.

It starts `mlx-vlm-prune serve`, asks every question alone, then sends requests, several at once, of
which a fifth are bad or leave before their answer is complete. Every good answer must equal the one
it got alone, every bad one must be refused for its own fault, none may be lost, and the memory of
the server's process must not grow in the second half: else the exit code is 1. The last line is one
JSON object of all figures.
"""

import argparse
import base64
import http.client
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from typing import Any

from PIL import Image

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.machine.hardware import describe_machine, versions
from mlx_vlm_prune.scenes import compose

from .command_line import parser, positive, run_command
from .server_process import server_process

PATH, JSON = "/v1/chat/completions", {"content-type": "application/json"}
WORDS = ("What colour is the star?", "What does the sign say?", "Is there a red square?")
SEED, PICTURES = 1_000_000_400, 4
BUDGETS: tuple[dict[str, Any], ...] = (
    {}, {"visual_tokens": 49}, {"keep_ratio": 0.25, "pruner": "divprune"},
    {"visual_tokens": 98, "pruner": "avgpool"}, {"keep_ratio": 0.5, "pruner": "cdpruner"},
)  # fmt: skip
DIFFERENT_REQUESTS = PICTURES * len(WORDS) * len(BUDGETS)
BAD_EVERY, LEAVING_EVERY = 10, 10  # so a fifth are bad or leave
GOOD_ENDS = {"same as alone", "refused", "left"}
MOST_GROWTH = 1.25  # of memory from half-way to the end; it goes up and down by some 15 %
PATIENCE = 600  # seconds for one answer


def data_uri(picture: Image.Image) -> str:
    """A picture as requests bring it."""
    file = BytesIO()
    picture.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@cache
def scene(number: int) -> str:
    """A picture that all requests of that number share."""
    return data_uri(compose(SEED + number).image())


def body(words: str, *uris: str, **options: Any) -> bytes:
    """A request about pictures."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": u}} for u in uris]
    parts.append({"type": "text", "text": words})
    return json.dumps({"messages": [{"role": "user", "content": parts}], **options}).encode()


def good_body(number: int, max_tokens: int, **options: Any) -> bytes:
    """Request number n: a picture, a question and a budget."""
    options |= {"max_tokens": max_tokens, **BUDGETS[number % len(BUDGETS)]}
    return body(WORDS[number % len(WORDS)], scene(number % PICTURES), **options)


@cache
def bad_bodies() -> list[tuple[bytes, int, str]]:
    """Bodies that must be refused, each with the status and with words of the sentence."""
    small = data_uri(Image.new("RGB", (9, 9)))
    return [
        (b"{", 400, "is not valid JSON"),
        (body("?", "data:image/png;base64,@@"), 400, "the data URI is damaged"),
        (body("?", data_uri(Image.new("RGB", (2000, 1)))), 400, "it has 2000 x 1 pixels"),
        (body("?", *[small] * 17), 400, "there are 17 pictures"),
        (b" " * 100_000_000, 413, "the body is larger than 64 MB"),
        (body("?", small, strict=True, visual_token=3), 400, "visual_token is not possible"),
        (body("?", small, keep_ratio=2), 400, "keep_ratio is 2"),
        (b'{"messages": []}', 400, "messages: "),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    p = parser("serving_load", __doc__)
    p.add_argument("--model", help="folder or name (default: the built-in scenes model)")
    p.add_argument("--requests", type=positive, default=500, help="how many are sent")
    p.add_argument("--clients", type=positive, default=16, help="how many at once")
    p.add_argument("--max-tokens", type=positive, default=48, help="of an answer")
    return p.parse_args(argv)


@contextmanager
def serving(model: str | None, *options: str) -> Iterator[tuple[int, int]]:
    """The id of a server's process with some options, and its port. Raises UserError where it does
    not start."""
    words = [sys.executable, "-m", "mlx_vlm_prune", "serve", "--port", "0", *options]
    words += ["--model", model] if model else []
    with server_process(words) as (process, address):
        yield process, int(address.rpartition(":")[2].partition("/")[0])


@contextmanager
def connection(port: int) -> Iterator[http.client.HTTPConnection]:
    """To the server; at the end of the block it is closed, answered or not."""
    opened = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        yield opened
    finally:
        opened.close()


def send(port: int, content: bytes) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    with connection(port) as opened:
        opened.request("POST", PATH, content, JSON)
        reply = opened.getresponse()
        return reply.status, json.loads(reply.read())


def leave(port: int, number: int, max_tokens: int) -> None:
    """Go in the middle of a stream, while the answer is waited for, or of the body."""
    way = number // LEAVING_EVERY % 3
    content = good_body(number, max_tokens, stream=way == 0)
    with connection(port) as opened:
        if way == 2:
            opened.putrequest("POST", PATH)
            for name, value in {**JSON, "content-length": str(len(content))}.items():
                opened.putheader(name, value)
            opened.endheaders(content[: len(content) // 2])
            return
        opened.request("POST", PATH, content, JSON)
        if way == 0:
            opened.getresponse().readline()


def outcome(port: int, number: int, max_tokens: int, alone: dict[int, Any]) -> str:
    """How request n ended."""
    if number % BAD_EVERY == 3:
        bodies = bad_bodies()
        content, status, words = bodies[number // BAD_EVERY % len(bodies)]
        answer = send(port, content)
        is_refused = answer[0] == status and words in answer[1]["error"]["message"]
        return "refused" if is_refused else f"bad request: {answer[0]}"
    if number % LEAVING_EVERY == 7:
        leave(port, number, max_tokens)
        return "left"
    status, answered = send(port, good_body(number, max_tokens))
    if status != 200:
        return f"lost: {status}"
    is_same = answered["choices"] == alone[number % DIFFERENT_REQUESTS]
    return "same as alone" if is_same else "another answer"


def outcome_or_fault(*arguments: Any) -> str:
    """How a request ended, also where its connection broke."""
    try:
        return outcome(*arguments)
    except (OSError, http.client.HTTPException, ValueError, KeyError) as problem:
        return f"lost: {type(problem).__name__}"


def answers_alone(port: int, args: argparse.Namespace) -> dict[int, Any]:
    """What each different request gets alone. Raises UserError for one that gets no answer."""
    alone = {}
    for number in range(min(args.requests, DIFFERENT_REQUESTS)):
        status, answered = send(port, good_body(number, args.max_tokens))
        if status != 200:
            raise UserError(f"request {number} is not even answered alone: {answered}")
        alone[number] = answered["choices"]
    return alone


def memory_mb(process: int) -> float:
    """What a process holds of the machine's memory."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(process)], capture_output=True, text=True)
    return int(done.stdout or 0) / 1000


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All requests, and what became of them."""
    server = serving(args.model, "--queue", "1000", "--cache-gb", "0.05")
    with server as (process, port), ThreadPoolExecutor(args.clients) as clients:
        alone = answers_alone(port, args)
        memory, start = [memory_mb(process)], time.perf_counter()
        waiting = [
            clients.submit(outcome_or_fault, port, n, args.max_tokens, alone)
            for n in range(args.requests)
        ]
        for request in waiting:
            request.result()
            memory.append(memory_mb(process))
        seconds = time.perf_counter() - start
    ends = Counter(request.result() for request in waiting)
    half = memory[len(memory) // 2 :]
    print(f"{args.requests} requests, {args.clients} at once, in {seconds:.1f} s: {dict(ends)}")
    print(
        f"Memory: {memory[0]:.0f} MB before, {max(memory):.0f} at most, {half[-1]:.0f} at the end"
    )
    return {
        "machine": describe_machine(), "versions": versions(), "cores": os.cpu_count(),
        "requests": args.requests, "clients": args.clients, "seconds": seconds, "ends": dict(ends),
        "memory_mb": {
            "before": memory[0], "half_way": half[0], "at_most": max(memory), "end": half[-1],
        },
    }  # fmt: skip


def faults(result: dict[str, Any]) -> list[str]:
    """The promises that were broken."""
    memory = result["memory_mb"]
    has_grown = memory["end"] > MOST_GROWTH * memory["half_way"]
    return sorted(result["ends"].keys() - GOOD_ENDS) + ["memory grows"] * has_grown


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. The exit code is 1 where a promise is broken."""
    broken = list[str]()

    def run_and_judge(args: argparse.Namespace) -> dict[str, Any]:
        result = run(args)
        broken.extend(faults(result))
        return result

    run_command(parse, run_and_judge, argv)
    if broken:
        sys.exit(f"wrong: {', '.join(broken)}")


if __name__ == "__main__":
    main()
