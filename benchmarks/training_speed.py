"""How fast a training step is: `python -m benchmarks.training_speed`.

Ours beside mlx-vlm's own trainer (`mlx_vlm.train`) and beside torch_ref on a CPU, and ours pruned
beside ours unpruned. All train the same random LLaVA on the same example with the same optimizer:
adapters (`lora`) or the language model (`sft`), also with gradient checkpointing, and in bfloat16 a
smaller model, since MLX multiplies that slowly on a CPU. Each is a process of its own; their steps
alternate, one at a time, after a warm-up. The first loss of all must be equal, or nothing is timed.

Tokens per second are those of a step: visual ones before pruning, question and answer. Memory is
the largest behind the first step, weights included: what MLX held, and what the process had. The
last line is one JSON object of all figures.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import util
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.loading import INSTALL
from mlx_vlm_prune.machine.hardware import describe_machine, versions
from mlx_vlm_prune.machine.timing import NOT_REPORTED, Gain, spread

from .command_line import parser, positive, run_command
from .training_sides import SIZES, Case, write_model

RTOL = {"float32": 1e-3, "bfloat16": 2e-2}  # of the first losses


@dataclass(frozen=True)
class Group:
    """What sides do in turns; `ours, pruned` keeps part of the visual tokens."""

    stage: str
    names: tuple[str, ...]
    dtype: str = "float32"
    grad_checkpoint: bool = False
    is_small: bool = False

    @property
    def title(self) -> str:
        checkpoint = ", recomputed" if self.grad_checkpoint else ""
        return f"{self.stage}, {self.dtype}{checkpoint}"


OURS, PRUNED, THEIRS, TORCH = "ours", "ours, pruned", "mlx-vlm", "torch_ref"
GROUPS = (
    Group("lora", (THEIRS, OURS, PRUNED, TORCH)),
    Group("lora", (THEIRS, OURS, PRUNED), grad_checkpoint=True),
    Group("sft", (THEIRS, OURS, PRUNED, TORCH)),
    Group("lora", (THEIRS, OURS, PRUNED), dtype="bfloat16", is_small=True),
)
# Of each pair: how many times as fast the second is.
PAIRS = ((THEIRS, OURS), (TORCH, OURS), (OURS, PRUNED))


class Process:
    """A side in a process of its own."""

    def __init__(self, case: Case):
        self.side = case.side
        main = "from benchmarks.training_sides import main; main()"
        command = [sys.executable, "-c", main, json.dumps(asdict(case))]
        self.errors = TemporaryFile("w+")  # noqa: SIM115 - a pipe would fill up; closed at the end
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            text=True, cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        self.first_loss = 0.0
        self.seconds: list[float] = []

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.errors):
            assert file
            with suppress(BrokenPipeError):  # it ended by itself
                file.close()

    def warm_up(self) -> None:
        """The first step."""
        _, self.first_loss = self._ask("step\n")

    def step(self) -> None:
        """One more, counted."""
        seconds, _ = self._ask("step\n")
        self.seconds.append(seconds)

    def end(self) -> dict[str, Any]:
        """The memory that it took."""
        assert self.process.stdin
        self.process.stdin.close()
        return dict(self._answer())

    def _ask(self, line: str) -> Any:
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.write(line)
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout
        if answer := self.process.stdout.readline():
            return json.loads(answer)
        self.process.wait()
        self.errors.seek(0)
        faults = self.errors.read().strip().splitlines() or ["it ended"]
        raise UserError(f"{self.side} cannot train: {faults[-1]}")


def case_of(group: Group, name: str, folder: str, args: argparse.Namespace) -> Case:
    """What a side of a group trains."""
    side = OURS if name == PRUNED else name
    size = args.small if group.is_small else args.size
    case = Case(side, folder, size, group.stage, group.dtype, group.grad_checkpoint)
    if name == PRUNED:
        case = replace(case, pruner=args.pruner, keep_ratio=args.keep_ratio)
    return case


def measure(group: Group, folder: str, args: argparse.Namespace, deadline: float) -> list[Any]:
    """The rows of a group: rounds of one step each until `deadline`, at least two."""
    names = [name for name in group.names if name in (OURS, PRUNED) or name not in args.without]
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(Process(case_of(group, name, folder, args))) for name in names
        }
        for side in sides.values():
            side.warm_up()
        require_equal(group, {name: side.first_loss for name, side in sides.items()}, folder, args)
        rounds, begin = 0, time.monotonic()
        while rounds < min(2, args.runs) or (
            rounds < args.runs and time.monotonic() + (time.monotonic() - begin) / rounds < deadline
        ):
            for side in sides.values():
                side.step()
            rounds += 1
        ends = {name: side.end() for name, side in sides.items()}
    seconds = {name: side.seconds for name, side in sides.items()}
    return [row(group, name, seconds, ends[name], args) for name in names]


def require_equal(
    group: Group, losses: dict[str, float], folder: str, args: argparse.Namespace
) -> None:
    """Raise UserError unless all unpruned sides begin with the same loss.

    mlx-vlm's is that of its model with a causal mask, which its trainer leaves out of LLaVA.
    """
    losses = {name: loss for name, loss in losses.items() if name != PRUNED}
    if losses.pop(THEIRS, None) is not None:
        case = replace(case_of(group, OURS, folder, args), side=f"{THEIRS} causal")
        with Process(case) as process:
            process.warm_up()
            losses[THEIRS] = process.first_loss
    for name, loss in losses.items():
        if not abs(loss - losses[OURS]) <= RTOL[group.dtype] * losses[OURS]:
            raise UserError(
                f"{group.title}: the first loss is {losses[OURS]:.5f}, and {loss:.5f} in {name};"
                " nothing is timed unless they are equal"
            )


def row(
    group: Group, name: str, seconds: dict[str, list[float]], end: dict[str, Any],
    args: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """The figures of a side, beside those that ran in turns with it."""
    size = args.small if group.is_small else args.size
    tokens = SIZES[size].tokens
    gains = {}
    for slow, fast in PAIRS:
        if fast == name and slow in seconds:
            gain = Gain.of(seconds[slow], seconds[fast])
            gains[slow] = {"realised": gain.reported, "median": gain.median,
                           "p10": gain.p10, "p90": gain.p90}  # fmt: skip
    return {
        "stage": group.stage, "dtype": group.dtype, "grad_checkpoint": group.grad_checkpoint,
        "size": size, "name": name, "tokens": tokens, "runs": len(seconds[name]),
        "seconds": spread(seconds[name]),
        "tokens_per_second": spread([tokens / s for s in seconds[name]]),
        "peak_bytes": end["peaks"], "blas": end["blas"], "gains": gains,
    }  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the printed table and of docs/training.md."""
    s, rate, peaks = row["seconds"], row["tokens_per_second"], row["peak_bytes"]
    mlx = f"{peaks['mlx'] / 1e6:.0f}" if peaks["mlx"] else "–"
    gains = [
        f"{gain['median']:.2f} ({gain['p10']:.2f} to {gain['p90']:.2f}) × {name}"
        for name, gain in row["gains"].items()
    ]
    return [
        row["stage"], row["dtype"] + (", recomputed" if row["grad_checkpoint"] else ""),
        row["name"], f"{s['median']:.2f} ({s['p10']:.2f} to {s['p90']:.2f})",
        f"{rate['median']:.0f}", mlx, f"{peaks['process'] / 1e6:.0f}", "; ".join(gains),
    ]  # fmt: skip


HEADS = (
    "stage", "dtype", "who", "a step, s", "tokens/s", "MLX's peak, MB", "process's peak, MB",
    "times as fast",
)  # fmt: skip
WIDTHS = (6, 21, 13, 21, 9, 15, 19, 0)


def print_cells(values: Sequence[str]) -> None:
    print("".join(f"{x:<{n}}" for x, n in zip(values, WIDTHS, strict=True)).rstrip(), flush=True)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print every group; the result."""
    groups = [group for group in GROUPS if group.stage in args.stage]
    begin, rows = time.monotonic(), list[dict[str, Any]]()
    print_cells(HEADS)
    with TemporaryDirectory() as folder:
        for i, group in enumerate(groups):
            size = args.small if group.is_small else args.size
            if not (place := Path(folder) / size).exists():
                place.mkdir()
                write_model(place, size)
            deadline = begin + 60 * args.minutes * (i + 1) / len(groups)
            rows += (measured := measure(group, str(place), args, deadline))
            for each in measured:
                print_cells(cells(each))
    print("Medians, first and last decile; a pruned step is that of"
          f" {args.pruner} at {args.keep_ratio:.0%}. A ratio that spreads by more than it differs"
          f" from 1 is {NOT_REPORTED.split(':')[0]} in the JSON.")  # fmt: skip
    return {
        "benchmark": "training_speed", "pruner": args.pruner, "keep_ratio": args.keep_ratio,
        "sizes": {name: asdict(SIZES[name]) for name in dict.fromkeys((args.size, args.small))},
        "threads": os.environ.get("OMP_NUM_THREADS"), "machine": describe_machine(),
        "versions": {**versions(), **_torch_version()}, "rows": rows,
    }  # fmt: skip


def _torch_version() -> dict[str, str]:
    from importlib.metadata import version

    return {"torch": version("torch")} if util.find_spec("torch") else {}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("training_speed", __doc__)
    add = p.add_argument
    add("--stage", action="append", choices=("lora", "sft"), help="repeat (default: both)")
    add("--size", choices=SIZES, default="mid", help="of the model in float32")
    add("--small", choices=SIZES, default="small", help="of the model in bfloat16")
    add("--pruner", default="visionzip", help="method of the pruned steps")
    add("--keep-ratio", type=float, default=0.25, help="share of the visual tokens to keep")
    add("--runs", type=positive, default=12, help="measured steps of each side, at most")
    add("--minutes", type=float, default=5.0, help="fewer steps where they take longer")
    args = p.parse_args(argv)
    args.stage = args.stage or ["lora", "sft"]
    if not 0 < args.keep_ratio < 1:
        raise UserError(f"--keep-ratio is {args.keep_ratio:g}; it must be between 0 and 1")
    if util.find_spec("mlx_vlm") is None:
        raise UserError(f"mlx-vlm cannot be found; {INSTALL}")
    args.without = () if util.find_spec("torch") else (TORCH,)
    return args


main = partial(run_command, parse, run)


if __name__ == "__main__":
    main()
