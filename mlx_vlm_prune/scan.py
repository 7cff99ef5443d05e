"""Scans and attention from short to long prompts: time, memory, and how both grow.

`mlx-vlm-prune scan` measures a layer of Mamba by the scan in blocks and by mlx-lm's loop, a layer
of attention as wide, and multi-resolution selective scanning (mrss), all with random weights.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .checkpoints.command_line import Parser, either, in_one_sentence, whole_number
from .checkpoints.errors import UserError
from .checkpoints.reading.files import check_target, write_atomically
from .machine.hardware import describe_machine, versions
from .models.language.selective_scan import multi_resolution_updates
from .planning.row_scaling import (
    ATTENTION,
    HEAD_DIM,
    LOOP,
    SCAN,
    Measurement,
    by_layer,
    exponent,
    layers,
    measure,
    ratios,
)
from .plots.row_scaling import KINDS, check_matplotlib, draw

ROWS = [256, 512, 1024, 2048, 4096, 8192, 16384]
DESCRIPTION = "Measure scans and attention from short to long prompts: time, memory, exponents."
EXAMPLE = """example:
  {program} --rows 256 1024 4096 --runs 5 --json scan.json --plot scan.svg"""


# fmt: off
def build_parser() -> Parser:
    """The command line of `scan`."""
    parser = Parser("mlx_vlm_prune.scan", description=DESCRIPTION)
    parser.epilog = " ".join(EXAMPLE.format(program=parser.prog).split())
    add, count = parser.add_argument, partial(whole_number, 1)
    add("--rows", type=count, nargs="+", default=ROWS, metavar="N",
        help="rows of a prompt")
    add("--runs", type=count, default=3, metavar="N", help="timed runs of each, in turns")
    add("--hidden-size", type=count, default=512, metavar="N",
        help=f"features of a row, a multiple of {HEAD_DIM}")
    add("--state-size", type=count, default=16, metavar="N", help="states of a feature")
    add("--every", type=count, nargs="+", default=[2, 4], metavar="R",
        help="mrss also scans every R-th row")
    add("--loop-rows", type=partial(whole_number, 0), default=2048, metavar="N",
        help="most rows for which mlx-lm's loop is timed")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--plot", type=Path, metavar="FILE", help=f"draw time and memory ({', '.join(KINDS)})")
    return parser
# fmt: on


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Check, measure, print and write."""
    if args.hidden_size % HEAD_DIM:
        raise UserError(f"hidden_size is {args.hidden_size}; it must be a multiple of {HEAD_DIM}")
    if args.plot:
        if args.plot.suffix not in KINDS:
            raise UserError(f"{args.plot} must end in {either(KINDS)}")
        check_matplotlib()  # before minutes have passed
    for file in filter(None, (args.json, args.plot)):
        check_target(file, replace=True)
    args.rows, args.every = sorted(set(args.rows)), sorted(set(args.every))
    named = layers(args.hidden_size, args.state_size, args.every)
    try:
        results = measure(named, args.hidden_size, args.rows, args.runs, args.loop_rows)
    except KeyboardInterrupt:
        print("\ninterrupted: nothing is written", file=sys.stderr)
        sys.exit(130)
    summary = summarize(results, args.every)
    print("\n".join([*table(results), "", *sentences(summary)]))
    if args.json:
        figures = {
            "command": "scan",
            "hidden_size": args.hidden_size, "state_size": args.state_size, "runs": args.runs,
            "measurements": [vars(result) for result in results], **summary,
            "machine": describe_machine(), "versions": versions(),
        }  # fmt: skip
        write_atomically(args.json, json.dumps(figures, indent=4, ensure_ascii=False) + "\n")
    if args.plot:
        draw(results, args.plot)


def summarize(results: Sequence[Measurement], every: Sequence[int]) -> dict[str, Any]:
    """Exponents of each layer, and what the scan stands to the loop and mrss to the scan.

    A ratio is of neighbours in the same round: median, least and most.
    """
    named = by_layer(results)
    exponents = {}
    for name, measured in named.items():
        ms = [(rows, one.spread[0]) for rows, one in measured.items()]
        memory = [(rows, one.peak_bytes) for rows, one in measured.items() if one.peak_bytes]
        exponents[name] = {
            "time": exponent(ms), "time_of_last_two": exponent(ms[-2:]), "memory": exponent(memory),
        }  # fmt: skip
    loops, scan = named.get(LOOP, {}), named[SCAN]
    most = max(scan)
    multi = {
        str(r): {
            "rows": most,
            "updates_to_scan": multi_resolution_updates(most, r) / most,
            "ms_to_scan": ratios(named[f"mrss r={r}"][most], scan[most]),
        }
        for r in every
    }
    return {
        "exponents": exponents,
        "loop_to_scan": {str(rows): ratios(loop, scan[rows]) for rows, loop in loops.items()},
        "attention_to_scan": {
            str(rows): ratios(one, scan[rows]) for rows, one in named[ATTENTION].items()
        },
        "mrss": multi,
    }


def table(results: Sequence[Measurement]) -> list[str]:
    """Milliseconds, their spread and memory: a line for each number of rows and layer."""
    lines = [f"{'rows':>6}  {'layer':<14}{'ms':>10}{'fastest':>10}{'slowest':>10}{'MB':>9}"]
    for result in results:
        times = "".join(f"{ms:>10.1f}" for ms in result.spread)
        lines.append(f"{result.rows:>6}  {result.layer:<14}{times}{result.peak_bytes / 1e6:>9.1f}")
    return lines


def sentences(summary: dict[str, Any]) -> list[str]:
    """The summary in words."""
    lines = []
    for name, exponents in summary["exponents"].items():
        if exponents["time"] is not None:
            memory = exponents["memory"]
            growth = "" if memory is None else f", memory as rows^{memory:.2f}"
            last = exponents["time_of_last_two"]
            lines.append(
                f"{name}: time grows as rows^{exponents['time']:.2f}, between the last two as"
                f" rows^{last:.2f}{growth}."
            )
    for rows, (median, least, most) in summary["loop_to_scan"].items():
        lines.append(
            f"At {rows} rows {LOOP} takes {median:.2f} x as long as the scan"
            f" ({least:.2f} to {most:.2f})."
        )
    for r, multi in summary["mrss"].items():
        (median, least, most), updates = multi["ms_to_scan"], multi["updates_to_scan"]
        lines.append(
            f"mrss r={r} at {multi['rows']} rows: {updates:.2f} x the scan's updates of a state,"
            f" {median:.2f} x its time ({least:.2f} to {most:.2f}); it saves nothing."
            if updates >= 1 and median >= 1
            else f"mrss r={r} at {multi['rows']} rows: {updates:.2f} x the scan's updates of a"
            f" state, {median:.2f} x its time ({least:.2f} to {most:.2f})."
        )
    return lines


if __name__ == "__main__":
    main()
