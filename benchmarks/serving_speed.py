"""What serving costs, and what pruning gains there: `python -m benchmarks.serving_speed`.

Each family is a random model in a folder, which `mlx-vlm-prune serve` answers with in a process of
its own, and `generate` in this one. A round takes turns: one request to the server with all visual
tokens, the same by `generate`; then several requests at once with all tokens, and the same with a
part of them by each method: one behind the tower and, where the tower takes most of a request, one
that shortens the tower, too. Nothing of earlier prompts is held. Timed is everything from the bytes
of a picture to the last of `--max-tokens` tokens. Rounds end after `--minutes` for each family. The
last line is one JSON object of all figures.
"""

import argparse
import base64
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.loading import INSTALL
from mlx_vlm_prune.machine.hardware import describe_machine, versions
from mlx_vlm_prune.machine.timing import Gain, spread, times_text

from .backend_mlx import device
from .command_line import natural, parser, positive, run_command
from .hosts import PATCH, SIZES, Size
from .model_shapes import photo
from .serving_load import send, serving
from .serving_models import write_llava, write_qwen2_5_vl

FAMILIES: dict[str, Callable[[Path, Size], None]] = {
    "llava": write_llava, "qwen2_5_vl": write_qwen2_5_vl,
}  # fmt: skip
WORDS = {"llava": "is there a red star in the picture ?", "qwen2_5_vl": "w11 w12 w13 w14 w15 w16"}
BEHIND, INSIDE = "divprune", "patch_norm+divprune"  # the tower
METHODS = {"llava": (BEHIND,), "qwen2_5_vl": (BEHIND, INSIDE)}
COST_GOAL, GAIN_GOAL = 1.03, 1.5  # of one request, and of several at once
FEWEST_ROUNDS = 2
SERVE, GENERATE, FULL = "serve", "generate", "full"  # the times of a round, beside the methods'


@dataclass(frozen=True)
class Rivals:
    """A server, and the same model here."""

    family: str
    port: int
    model: Any
    processor: Any
    args: argparse.Namespace

    @property
    def pruners(self) -> Sequence[str]:
        """The methods of the pruned requests."""
        pruners: Sequence[str] = self.args.pruner or METHODS[self.family]
        return pruners

    def body(self, number: int, **budget: Any) -> bytes:
        """A request with a picture of its own."""
        uri = f"data:image/jpeg;base64,{base64.b64encode(self.picture(number)).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": uri}},
            {"type": "text", "text": WORDS[self.family]},
        ]
        messages = [{"role": "user", "content": content}]
        options = {"max_tokens": self.args.max_tokens, "strict": True, **budget}
        return json.dumps({"messages": messages, **options}).encode()

    def picture(self, number: int) -> bytes:
        """A JPEG of which both families' towers make as many tokens."""
        side = 2 * PATCH * SIZES[self.args.size].side
        return photo(number, (side, side))

    def serve_one(self, body: bytes) -> tuple[float, str]:
        """Milliseconds and text of an answer of the server's. Raises UserError without one."""
        began = time.perf_counter()
        status, content = send(self.port, body)
        ms = 1000 * (time.perf_counter() - began)
        if status != 200:
            raise UserError(f"{self.family}: the server answered {status}: {content}")
        return ms, content["choices"][0]["message"]["content"]

    def generate_one(self, number: int) -> tuple[float, str]:
        """The same by `generate`."""
        picture = self.picture(number)
        began = time.perf_counter()
        answer = generate(
            self.model, self.processor, WORDS[self.family], picture,
            max_tokens=self.args.max_tokens,
        )  # fmt: skip
        return 1000 * (time.perf_counter() - began), answer.text

    def serve_many(self, bodies: Sequence[bytes]) -> float:
        """Seconds until requests at once are all answered."""
        with ThreadPoolExecutor(len(bodies)) as clients:
            began = time.perf_counter()
            answers = [*clients.map(self.serve_one, bodies)]
            seconds = time.perf_counter() - began
        assert len(answers) == len(bodies)
        return seconds


Times = dict[str, list[float]]


def take_round(rivals: Rivals, number: int, times: Times) -> None:
    """One turn of each; of one request, which takes less time, several."""
    args = rivals.args
    for pair in range(args.pairs):
        answer_both(rivals, args.pairs * number + pair, times)
    numbers = range(args.clients)
    times[FULL].append(rivals.serve_many([rivals.body(n) for n in numbers]))
    for pruner in rivals.pruners:
        budget = {"pruner": pruner, "keep_ratio": args.keep_ratio}
        times[pruner].append(rivals.serve_many([rivals.body(n, **budget) for n in numbers]))


def answer_both(rivals: Rivals, number: int, times: Times) -> None:
    """One request to the server, and the same by `generate`. Raises UserError where they differ."""
    body = rivals.body(number)
    serve_one, generate_one = partial(rivals.serve_one, body), partial(rivals.generate_one, number)
    order = [(SERVE, serve_one), (GENERATE, generate_one)]
    texts = set()
    for name, answer in order[:: 1 - 2 * (number % 2)]:  # each is first as often as the other
        ms, text = answer()
        times[name].append(ms)
        texts.add(text)
    if len(texts) > 1:
        raise UserError(f"{rivals.family}: the server's answer is another than generate's")


def measure(family: str, args: argparse.Namespace) -> dict[str, Any]:
    """The row of a family."""
    mx.random.seed(0)
    options = ("--cache-gb", "0", "--batch", str(args.clients), "--max-images", "1")
    with TemporaryDirectory() as home:
        folder = Path(home) / family
        FAMILIES[family](folder, SIZES[args.size])
        with serving(str(folder), *options) as (_, port):
            rivals = Rivals(family, port, *load(folder), args)
            times: Times = {name: [] for name in (SERVE, GENERATE, FULL, *rivals.pruners)}
            for number in range(args.warmup):
                take_round(rivals, number, {name: [] for name in times})
            end = time.perf_counter() + 60 * args.minutes
            for number in range(args.runs):
                if number >= FEWEST_ROUNDS and time.perf_counter() > end:
                    break
                take_round(rivals, number, times)
    cost = Gain.of(times[SERVE], times[GENERATE])
    gains = {pruner: Gain.of(times[FULL], times[pruner]) for pruner in rivals.pruners}
    return {
        "family": family, "size": args.size, "tokens": SIZES[args.size].side ** 2,
        "one_ms": {name: spread(times[name]) for name in (SERVE, GENERATE)},
        "serve_by_generate": {"median": cost.median, "p10": cost.p10, "p90": cost.p90},
        "requests_per_s": {
            name: spread([args.clients / s for s in times[name]]) for name in (FULL, *gains)
        },
        "gains": {pruner: gain.report(None) for pruner, gain in gains.items()},
        "pairs": cost.runs, "runs": len(times[FULL]),
    }  # fmt: skip


def print_row(row: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the figures of a family."""
    cost, rates = row["serve_by_generate"], row["requests_per_s"]
    one = {name: spread_ms["median"] for name, spread_ms in row["one_ms"].items()}
    print(
        f"{row['family']}, {row['size']}, {row['tokens']} visual tokens, {row['runs']} rounds\n"
        f"  one request: {one[SERVE]:.0f} ms, by generate {one[GENERATE]:.0f}: "
        f"{cost['median']:.3f} of it ({cost['p10']:.3f} to {cost['p90']:.3f}; the goal is "
        f"{COST_GOAL} at most)\n"
        f"  {args.clients} at once: {rates[FULL]['median']:.2f} requests/s with all tokens"
    )
    for pruner, gain in row["gains"].items():
        print(
            f"    {rates[pruner]['median']:.2f} with {args.keep_ratio:.0%} by {pruner}: "
            f"{times_text(gain['realised'], 'not told')} ({gain['p10']:.2f} to {gain['p90']:.2f}; "
            f"the goal is {GAIN_GOAL} at least)",
            flush=True,
        )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print every chosen family; the result."""
    rows = []
    for family in args.family or FAMILIES:
        rows.append(measure(family, args))
        print_row(rows[-1], args)
    return {
        "benchmark": "serving_speed", "device": device(), "machine": describe_machine(),
        "versions": versions(),
        "clients": args.clients, "max_tokens": args.max_tokens,
        "keep_ratio": args.keep_ratio, "goals": {"cost": COST_GOAL, "gain": GAIN_GOAL},
        "rows": rows,
    }  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("serving_speed", __doc__)
    add = p.add_argument
    add("--family", action="append", choices=FAMILIES, help="model family; repeat (default: all)")
    add("--size", choices=SIZES, default="mid", help="model size (default: mid)")
    add(
        "--pruner",
        action="append",
        help="method of the pruned requests; repeat (default: "
        f"{BEHIND}, of Qwen2.5-VL also {INSIDE})",
    )
    add("--keep-ratio", type=float, default=0.25, help="share of the visual tokens to keep")
    add("--clients", type=positive, default=8, help="requests at once")
    add("--max-tokens", type=positive, default=16, help="of an answer")
    add("--pairs", type=positive, default=3, help="turns of one request in a round")
    add("--runs", type=positive, default=10, help="rounds, if there is time for them")
    add("--warmup", type=natural, default=1, help="rounds before those")
    add("--minutes", type=float, default=1.5, help="for each family's rounds; two at least are run")
    args = p.parse_args(argv)
    if not 0 < args.keep_ratio <= 1:
        raise UserError(f"--keep-ratio is {args.keep_ratio:g}; it must be above 0 and up to 1")
    if not 0 < args.minutes < float("inf"):
        raise UserError(f"--minutes is {args.minutes:g}; it must be above 0")
    if util.find_spec("mlx_vlm") is None:
        raise UserError(f"mlx-vlm cannot be found; {INSTALL}")
    return args


main = partial(run_command, parse, run)


if __name__ == "__main__":
    main()
