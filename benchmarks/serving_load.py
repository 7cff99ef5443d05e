"""Does the server keep its promises under load? `python -m benchmarks.serving_load`.

It starts `mlx-vlm-prune serve`, asks every question alone, then sends requests, several at once, of
which a fifth are bad or leave before their answer is complete. Every good answer must equal the one
it got alone, and none may be lost. The memory of the server's process is read all the while. The
last line is one JSON object of all figures.
"""

import argparse
import base64
import http.client
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.machine.hardware import describe_machine, versions
from mlx_vlm_prune.scenes import compose

from .command_line import parser, positive, run_command

PATH, JSON = "/v1/chat/completions", {"content-type": "application/json"}
WORDS = ("What colour is the star?", "What does the sign say?", "Is there a red square?")
SEED, PICTURES = 1_000_000_400, 4
BUDGETS: tuple[dict[str, Any], ...] = (
    {}, {"visual_tokens": 49}, {"keep_ratio": 0.25, "pruner": "divprune"},
    {"visual_tokens": 98, "pruner": "avgpool"}, {"keep_ratio": 0.5, "pruner": "cdpruner"},
)  # fmt: skip
BAD = (
    b"{",
    json.dumps({"messages": []}).encode(),
    json.dumps({"messages": [{"role": "user", "content": "?"}], "keep_ratio": 2}).encode(),
    b" " * 70_000_000,
)
PATIENCE = 600  # seconds for one answer


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    p = parser("serving_load", __doc__)
    p.add_argument("--model", help="folder or name (default: the built-in scenes model)")
    p.add_argument("--requests", type=positive, default=500, help="how many are sent")
    p.add_argument("--clients", type=positive, default=16, help="how many at once")
    p.add_argument("--max-tokens", type=positive, default=48, help="of an answer")
    return p.parse_args(argv)


@contextmanager
def serving(model: str | None) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server's process and its port. Raises UserError where it does not start."""
    words = [
        sys.executable,
        "-m",
        "mlx_vlm_prune",
        "serve",
        "--port",
        "0",
        "--queue",
        "1000",
        "--cache-gb",
        "0.05",
    ]
    words += ["--model", model] if model else []
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        while line.startswith("note: "):
            line = process.stderr.readline()
        if "/v1" not in line:
            raise UserError(f"the server did not start: {line.strip()}")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        try:
            yield process, int(line.rpartition(":")[2].partition("/")[0])
        finally:
            process.terminate()


def body(n: int, max_tokens: int) -> dict[str, Any]:
    """Request number n: a picture, a question and a budget."""
    file = io.BytesIO()
    compose(SEED + n % PICTURES).image().save(file, format="PNG")
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": WORDS[n % len(WORDS)]},
    ]
    messages = [{"role": "user", "content": parts}]
    return {"messages": messages, "max_tokens": max_tokens, **BUDGETS[n % len(BUDGETS)]}


def send(port: int, content: bytes) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("POST", PATH, content, JSON)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def leave(port: int, content: dict[str, Any]) -> None:
    """Begin to read a stream, and go."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("POST", PATH, json.dumps({**content, "stream": True}), JSON)
        connection.getresponse().readline()
    finally:
        connection.close()


def outcome(port: int, n: int, max_tokens: int, alone: dict[int, Any]) -> str:
    """How request n ended."""
    if n % 10 == 3:
        status, _ = send(port, BAD[n // 10 % len(BAD)])
        return "refused" if 400 <= status < 500 else f"bad request: {status}"
    if n % 10 == 7:
        leave(port, body(n, max_tokens))
        return "left"
    status, content = send(port, json.dumps(body(n, max_tokens)).encode())
    if status != 200:
        return f"lost: {status}"
    return "same as alone" if content["choices"] == alone[kind(n)] else "another answer"


def kind(n: int) -> int:
    """Requests of a kind have the same answer."""
    return n % (PICTURES * len(WORDS) * len(BUDGETS))


def memory_mb(process: int) -> float:
    """What a process holds of the machine's memory."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(process)], capture_output=True, text=True)
    return int(done.stdout or 0) / 1000


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All requests, and what became of them."""
    with serving(args.model) as (process, port), ThreadPoolExecutor(args.clients) as clients:
        kinds = range(min(args.requests, kind(-1) + 1))
        answers = [send(port, json.dumps(body(n, args.max_tokens)).encode()) for n in kinds]
        alone = {n: content["choices"] for n, (_, content) in zip(kinds, answers, strict=True)}
        memory, start = [memory_mb(process.pid)], time.perf_counter()
        waiting = [
            clients.submit(outcome, port, n, args.max_tokens, alone) for n in range(args.requests)
        ]
        for one in waiting:
            one.result()
            memory.append(memory_mb(process.pid))
        seconds = time.perf_counter() - start
        ends = Counter(one.result() for one in waiting)
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


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(parse, run, argv)


if __name__ == "__main__":
    main()
