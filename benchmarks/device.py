"""What pruning gains on this machine, whatever it is: `python -m benchmarks.device`.

On MLX's default device: the ceilings first (matrix rate, bandwidth of memory), then for each number
of visual tokens and each shape, with random weights, every method at each budget, and a new token
beside mlx-lm's. Pruned and full requests alternate in one process. Opening the picture is measured
apart. After every case the result is written to benchmarks/results/device-NAME.json; the last line
is the same JSON. A run that was interrupted goes on with the file, where machine, versions and
commit are the same; delete the file to measure again. `python -m benchmarks.report` makes
docs/devices.md of all such files.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_vlm_prune.checkpoints.command_line import Parser
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.reading.files import optional_json, write_atomically
from mlx_vlm_prune.checkpoints.reading.locks import writing_alone
from mlx_vlm_prune.inputs.budget import tokens_for
from mlx_vlm_prune.machine.hardware import describe_machine, versions
from mlx_vlm_prune.machine.timing import alternate
from mlx_vlm_prune.models.language.minimind import MiniMind
from mlx_vlm_prune.pruners import METHODS, Stage

from . import command_line
from .backend_mlx import Stack, device
from .command_line import plain_name, positive, run_command
from .device_ceilings import (
    SMALLEST,
    ceilings,
    check_fits,
    default_name,
    is_gpu,
    largest_that_fits,
    memory_bytes,
    rounded,
)
from .language import RTOL
from .model_shapes import SHAPES, TEXT_TOKENS, WHOLE, Request, request, shape
from .rivals import RIVALS, measure_pair, pair_languages, print_rows, require_equal
from .selectors import time_calls
from .speed import Setting, cases, check_pruners, row, share_of_tokens
from .timing import Run

TOKENS, RATIOS = (576, 2304, 5184), (0.25, 0.5, 0.11)  # what tells most comes first
SMALL = "minimind2-v"
NEW_TOKENS = 16  # of each side's answer beside mlx-lm
# In two minutes: what costs nothing, what chooses far apart, by attention, with merges, in layers.
QUICK: dict[str, Any] = {
    "shape": [SMALL], "tokens": [576], "keep_ratio": [0.25], "runs": 3, "minutes": 2.0,
    "pruner": ["random", "divprune", "cls_attention", "visionzip", "fastv"],
}  # fmt: skip
ENVIRONMENT = ("commit", "device", "dtype", "machine", "threads", "versions")
PARTS = ("vision", "pruner", "projector", "prefill", "total")
CaseKey = tuple[str, int, str, int]  # shape, visual tokens, pruner, budget


@dataclass
class Report:
    """The result so far, its file, and when time is over."""

    result: dict[str, Any]
    file: Path
    end: float  # of time.monotonic
    wanted: list[CaseKey] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.end

    def is_done(self, key: CaseKey) -> bool:
        entries = self.result["rows"] + self.result["refused"]
        return any(case_key(entry) == key for entry in entries)

    def has(self, part: str, where: dict[str, Any]) -> bool:
        """Is there an entry of a part for a shape and number of tokens?"""
        return any(entry.items() >= where.items() for entry in self.result[part])

    def missing(self) -> list[CaseKey]:
        return [key for key in self.wanted if not self.is_done(key)]

    def add(self, part: str, *entries: dict[str, Any]) -> None:
        """Write the result with more entries of a part."""
        self.result[part] += entries
        self.result["missing"] = self.missing()
        self.file.parent.mkdir(exist_ok=True)
        write_atomically(self.file, json.dumps(self.result) + "\n")


def case_key(entry: dict[str, Any]) -> CaseKey:
    return entry["shape"], entry["tokens"], entry["pruner"], entry["budget"]


def commit() -> str | None:
    """The commit that git says is checked out, with a mark where code was changed since."""
    here = Path(__file__).parent
    git = partial(subprocess.run, cwd=here.parent, capture_output=True, text=True)
    try:
        shown = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        changed = git(["git", "status", "--porcelain", "mlx_vlm_prune", "benchmarks/*.py"]).stdout
    except OSError:
        return None
    return shown + " with changes" * bool(changed) if shown else None


def measure_setting(setting: Setting, args: argparse.Namespace, report: Report) -> None:
    """A shape at one number of tokens: the picture, case by case, then the language model."""
    config, tokens = setting.config, setting.config.N
    stack = Stack(config, args.dtype)
    inputs = request(config, setting.text)
    where = {"shape": setting.shape, "tokens": tokens}
    if not report.has("pictures", where):
        report.add("pictures", {**where, "ms": rounded(time_calls(inputs.pixels_IHW3, args.runs))})
    inputs = replace(inputs, opened_IHW3=mx.array(inputs.pixels_IHW3()).astype(stack.model.dtype))
    for ratio, spec in itertools.product(args.keep_ratio, args.pruner):
        case = {**where, "pruner": spec, "budget": tokens_for(tokens, ratio)}
        if report.is_over:
            return
        if not report.is_done(case_key(case)):
            measure_case(setting, stack, inputs, case, report)
    if not report.is_over and not report.has("languages", where):
        report.add("languages", *languages(where, stack.model.language, args))


def languages(where: dict[str, Any], model: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of our language model beside mlx-lm's, same weights; or one that says why not."""
    if missing := RIVALS["mlx-lm"].missing:
        return [{**where, "why": f"{', '.join(missing)} is not installed"}]
    assert isinstance(model, MiniMind)
    rows = where["tokens"] + TEXT_TOKENS
    pair = pair_languages(model, rows)
    try:
        difference = rounded(require_equal(where["shape"], "mlx-lm", pair, RTOL[args.dtype]))
        header = {**where, "rival": "mlx-lm", "device": pair.device, "prompt_rows": rows,
                  "difference": difference, "version": metadata.version("mlx-lm")}  # fmt: skip
        turns = argparse.Namespace(runs=args.runs, warmup=1, tokens=NEW_TOKENS)
        measured = measure_pair(pair, header, turns)
    except (UserError, RuntimeError) as e:  # of memory, too
        return [{**where, "why": str(e)}]
    print_rows(measured, args.dtype)
    return [rounded(entry) for entry in measured]


def measure_case(
    setting: Setting, stack: Stack, inputs: Request, case: dict[str, Any], report: Report
) -> None:
    """Full and pruned in turns until there are enough, or time is over; a row or a refusal."""
    spec, K = case["pruner"], case["budget"]
    full, possible, refused = cases(setting, stack, [spec], [K])
    if refused:
        report.add("refused", {**case, "why": refused[0]["why"]})
        return
    runs = [partial(stack.run, inputs, each.pipeline, each.K, 0) for each in (full, *possible)]
    measured: list[tuple[Run, Run]] = []
    turns = (report.result["runs"], 1, 1)  # one warms up
    try:
        for _, pruned, before in alternate(runs[0], runs[1:], *turns, f"{spec}, {K}"):
            measured.append((before, pruned))
            if report.is_over:
                break
    except RuntimeError as e:  # one method that this device cannot compute, or not in its memory
        report.add("refused", {**case, "why": str(e)})
        return
    figures = row(setting, full, possible[0], measured)
    ms = {kind: {part: figures["ms"][kind][part] for part in PARTS} for kind in figures["ms"]}
    gain = {part: figures["gain"][part] for part in ("vision", "total")}
    if len(measured) == 1:  # a single pair has no spread, so its gain is not clear
        gain = {part: {**each, "realised": None, "of_predicted": None}
                for part, each in gain.items()}  # fmt: skip
    entry = rounded({**case, "kept": figures["kept"], "runs": len(measured), "ms": ms,
                     "gain": gain, "peak_bytes": figures["peak_bytes"]})  # fmt: skip
    report.add("rows", entry)
    print_case(entry)


def print_case(entry: dict[str, Any]) -> None:
    medians = {kind: {part: ms["median"] for part, ms in parts.items()}
               for kind, parts in entry["ms"].items()}  # fmt: skip
    pruned, gain = medians["pruned"], entry["gain"]["total"]
    print(
        f"{entry['shape']:<12}{entry['tokens']:>5} to {entry['budget']:<5}{entry['pruner']:<20}"
        f"tower {pruned['vision']:.1f}, choosing {pruned['pruner']:.1f}, prefill "
        f"{pruned['projector'] + pruned['prefill']:.1f}, first token {pruned['total']:.1f} ms; full"
        f" {medians['full']['total']:.1f}: {gain['p10']:.2f} to {gain['p90']:.2f} times as fast",
        flush=True,
    )


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    """Every shape at every number of tokens, few tokens first. Raises UserError."""
    for tokens in sorted(args.tokens):
        for name in args.shape:
            config = shape(name)
            block = config.vision.patch_size * max(config.merge)
            side = block * max(1, math.isqrt(tokens))
            if tokens != shape(name, side).N:
                raise UserError(f"--tokens is {tokens}; it must be a square, as 576 is")
            yield Setting(name, 1, TEXT_TOKENS, side)


def start_report(args: argparse.Namespace) -> Report:
    """The result to begin with: that of the file, where it is of the same environment."""
    result: dict[str, Any] = {
        "benchmark": "device", "name": args.name, "date": datetime.date.today().isoformat(),
        "commit": args.commit or commit(), "device": device(), "memory_bytes": memory_bytes(),
        "dtype": args.dtype, "machine": describe_machine(), "versions": versions(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load": rounded(os.getloadavg()[0]) if hasattr(os, "getloadavg") else None,
        "runs": args.runs, "text": TEXT_TOKENS, "ceilings": {},
        "pictures": [], "languages": [], "rows": [], "refused": [], "missing": [],
    }  # fmt: skip
    file = result_file(args)
    before = optional_json(file)
    comparable = result["commit"] and "with changes" not in result["commit"]
    if comparable and all(before.get(name) == result[name] for name in ENVIRONMENT):
        for name in ("pictures", "languages", "rows", "refused"):
            result[name] = before[name]
        result["languages"] = [entry for entry in result["languages"] if "why" not in entry]
        print(f"{file.name} has {len(result['rows'])} cases of this commit; they are kept")
    end = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    wanted = [
        (setting.shape, setting.config.N, spec, tokens_for(setting.config.N, ratio))
        for setting in settings(args) for ratio in args.keep_ratio for spec in args.pruner
    ]  # fmt: skip
    return Report(result, file, end, wanted)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all that is wanted and not there yet; the result.

    Raises UserError where another process writes the same file.
    """
    command_line.RESULTS.mkdir(exist_ok=True)
    with writing_alone(result_file(args), "measuring", "--name"):
        return measure_missing(start_report(args), args)


def result_file(args: argparse.Namespace) -> Path:
    return command_line.RESULTS / f"device-{args.name}.json"


def measure_missing(report: Report, args: argparse.Namespace) -> dict[str, Any]:
    """Measure until all is there, or time is over; the result."""
    result = report.result
    memory = result["memory_bytes"]
    print(f"{result['machine']['cpu']}, MLX on {result['device']}"
          + (f", {memory / 1e9:.0f} GB for a model" if memory else ""))  # fmt: skip
    result["ceilings"] = ceilings(args.dtype)
    rates = ", ".join(f"{rate:g} Tflop/s in {name}"
                      for name, rate in result["ceilings"]["tflops"].items())  # fmt: skip
    print(f"Ceilings: matrix products {rates}; memory {result['ceilings']['gb_per_s']:g} GB/s",
          flush=True)  # fmt: skip
    mx.random.seed(0)
    for setting in settings(args):
        where = {"shape": setting.shape, "tokens": setting.config.N}
        keys = (key for key in report.missing() if key[:2] == tuple(where.values()))
        if not report.is_over and (any(keys) or not report.has("languages", where)):
            measure_setting(setting, args, report)
            mx.clear_cache()
    report.add("rows")
    if RIVALS["mlx-lm"].missing:
        print(f"Nothing beside mlx-lm: pip install {RIVALS['mlx-lm'].install}", file=sys.stderr)
    if missing := result["missing"]:
        first = "; ".join(" ".join(map(str, key)) for key in missing[:5])
        of = f"{len(missing)} of {len(report.wanted)}"
        print(f"Time was over: {of} cases are missing, the first of them {first}")
    print(f"Kept as {report.file.parent.name}/{report.file.name}")
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser("benchmarks.device", description=(__doc__ or "").split("\n\n")[0])
    add = p.add_argument
    add("--name", type=plain_name, help="of the result (default: the device's)")
    add("--shape", action="append",
        help=f"{', '.join(SHAPES)}; repeat (default: {SMALL}, and {WHOLE} or the largest of its"
        f" cuts that fits; on a CPU {SMALLEST})")  # fmt: skip
    add(
        "--tokens", type=positive, action="append", help="visual; repeat (default: 576, 2304, 5184)"
    )
    add("--pruner", action="append", help="NAME, NAME:option=value or a chain; repeat (default:"
        " every method)")  # fmt: skip
    add("--keep-ratio", type=share_of_tokens, action="append",
        help="repeat (default: 0.25, 0.5, 0.11)")  # fmt: skip
    add("--runs", type=positive, help="measured runs of each case (default: 5)")
    add("--minutes", type=minutes, help="begin no case after so long (default: no end)")
    add(
        "--quick",
        action="store_true",
        help=f"in {QUICK['minutes']:g} minutes {', '.join(QUICK['pruner'])} in a small shape",
    )
    add("--commit", help="where there is no git checkout to name it")
    args = p.parse_args(argv)
    args.dtype = "bfloat16" if is_gpu() else "float32"
    for name, value in (QUICK if args.quick else all_cases(args.dtype)).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_pruners(args.pruner)
    for setting in settings(args):  # a wrong one is refused before any is measured
        check_fits(setting.shape, args.dtype)
    args.name = args.name or default_name() + "-quick" * args.quick
    args.save = f"device-{args.name}"
    return args


def all_cases(dtype: str) -> dict[str, Any]:
    """Options that are not given: every method, in a small shape and a large one."""
    large = largest_that_fits(dtype, memory_bytes()) if is_gpu() else SMALLEST
    whole = [name for name, m in METHODS.items() if name != "none" and m.stage < Stage.ENHANCER]
    return {"shape": [SMALL, large], "tokens": [*TOKENS], "keep_ratio": [*RATIOS], "runs": 5,
            "pruner": whole}  # fmt: skip


def minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


main = partial(run_command, parse, run)


if __name__ == "__main__":
    main()
