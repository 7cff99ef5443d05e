"""Prints the figures of `benchmarks.speed` as a table of fixed width."""

import textwrap
from collections.abc import Sequence
from typing import Any

from mlx_vlm_prune.machine.timing import NOT_REPORTED

from .timing import PARTS

WIDTH = 118
TIMES = (*PARTS, "total", "token")
HEADS = ("image", "tower", "pruner", "project", "prefill", "first", "token")
GAINS = {"vision": "tower", "prefill": "prefill", "total": "first token"}


def print_table(
    rows: Sequence[dict[str, Any]], refused: Sequence[dict[str, Any]], runs: int
) -> None:
    """Print full, every row, what was refused, and what the columns mean."""
    name = max(10, *(len(row["pruner"]) for row in rows))
    heads = "".join(f"{head:>9}" for head in HEADS) + "".join(f"{h:>13}" for h in GAINS.values())
    print(f"{'':<{name}}{'':>6}{'ms, median':>63}{'times as fast (count)':>36}{'peak':>8}")
    print(f"{'pruner':<{name}}{'kept':>6}{heads}{'MB':>8}")
    longest = max(rows, key=lambda row: row["tokens"])
    print(f"{'full':<{name}}{longest['tokens']:>6}{_times(longest, 'full')}{'':>39}", end="")
    print(f"{_mb(longest, 'full'):>8}")
    for row in rows:
        gains = "".join(f"{_gain(row['gain'][part]):>13}" for part in GAINS)
        print(f"{row['pruner']:<{name}}{row['kept']:>6.0f}{_times(row, 'pruned')}{gains}", end="")
        print(f"{_mb(row, 'pruned'):>8}")
    for case in refused:
        print(f"{case['pruner']:<{name}}{case['budget']:>6}  {case['why']}")
    print(textwrap.fill(
        f"Medians of {runs} runs. first: from the image's file to the first token; token: each new "
        "one. In brackets what the operation count allows, in which opening the image and choosing "
        f"tokens take no time. –: {NOT_REPORTED}.", WIDTH
    ), flush=True)  # fmt: skip


def _times(row: dict[str, Any], kind: str) -> str:
    return "".join(f"{row['ms'][kind][part]['median']:>9.1f}" for part in TIMES)


def _gain(gain: dict[str, Any]) -> str:
    realised = "–" if gain["realised"] is None else f"{gain['realised']:.2f}"
    return f"{realised} ({gain['predicted']:.2f})"


def _mb(row: dict[str, Any], kind: str) -> str:
    peak = row["peak_bytes"][kind]
    return "–" if peak is None else f"{peak / 1e6:.0f}"
