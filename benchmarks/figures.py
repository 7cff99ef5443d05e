"""Draw what was measured: `python -m benchmarks.figures`.

Reads benchmarks/results and writes docs/figures, each as SVG and PNG: accuracy against tokens and
against time to first token, measured and predicted gains, the time of each part, the cache's
memory, the accuracy lost by each kind of question, and a dashboard of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_vlm_prune.checkpoints.command_line import Parser, in_one_sentence
from mlx_vlm_prune.plots import panels
from mlx_vlm_prune.plots.panels import TimedPoint
from mlx_vlm_prune.plots.style import (
    STRONG,
    figure_style,
    figure_with_axes,
    figure_with_grid,
    label_lines,
    save_figure,
)
from mlx_vlm_prune.pruners import METHODS
from mlx_vlm_prune.scenes import KINDS

from .readme_tables import read, speed_rows
from .report import ENHANCED, RESULTS, ROOT, scenes
from .timing import PARTS

if TYPE_CHECKING:  # matplotlib may be missing until something is drawn
    from matplotlib.axes import Axes

FIGURES = ROOT / "docs" / "figures"
QUARTER = 49  # tokens, of 196
BAR_METHODS = ("cls_attention", "tome", "downsample")  # all shapes were timed with them


def single_methods(accuracy: dict) -> dict:
    """Results of single methods with default options: no chain and no baseline `none`."""
    return {name: rows for name, rows in accuracy.items() if name in METHODS and name != "none"}


def lines_of(accuracy: dict) -> dict[str, dict[float, float]]:
    """For every single method, alone and with `restore`, its right answers in % by tokens."""
    singles = single_methods(accuracy)
    enhanced = {name: rows for name, rows in accuracy.items() if _selector(name) in singles}
    return {
        name: {tokens: 100 * row["overall"] for tokens, row in rows.items()}
        for name, rows in (singles | enhanced).items()
    }


def _selector(spec: str) -> str:
    """The method before `restore`, if there is just one."""
    name, plus, last = spec.partition("+")
    return name if plus + last == ENHANCED else ""


def best_methods(accuracy: dict, tokens: int) -> list[str]:
    """The most accurate methods at a number of tokens, as many as a figure labels."""
    return panels.best_methods(lines_of(accuracy), tokens)


def accuracy_by_tokens(axes: Axes, results: Path) -> None:
    """A line for each method; the baselines and the best at a quarter are labelled."""
    accuracy = scenes(results)
    full = (196, 100 * accuracy["none"][196]["overall"])
    panels.lines_by_tokens(axes, lines_of(accuracy), full, best_methods(accuracy, QUARTER))
    axes.set_ylabel("questions answered right, %")
    axes.set_title("Accuracy against tokens")


def kinds(axes: Axes, results: Path, tokens: int = QUARTER) -> None:
    """Accuracy lost by each kind of question; a row for each method, the best first."""
    accuracy = scenes(results)
    full = accuracy["none"][196]["accuracy"]
    measured = {
        name: rows[tokens] for name, rows in single_methods(accuracy).items() if tokens in rows
    }
    order = sorted(measured, key=lambda name: -measured[name]["overall"])
    loss = np.array([[100 * (measured[n]["accuracy"][k] - full[k]) for k in KINDS] for n in order])
    panels.differences(axes, order, KINDS, loss)
    axes.set_title(f"What {tokens} of 196 tokens cost, by kind of question")


def shape_rows(results: Path, shape: str) -> list[dict[str, Any]]:
    """The speed benchmark's rows of a shape."""
    return [row for row in speed_rows(results) if row["shape"] == shape]


def accuracy_by_time(axes: Axes, results: Path) -> None:
    """A point for each method and budget, and the Pareto frontier."""
    accuracy, points = scenes(results), []
    for row in shape_rows(results, "scenes"):
        judged = accuracy.get(row["pruner"], {}).get(row["budget"])
        if judged:
            first = row["ms"]["pruned"]["total"]["median"]
            value = 100 * judged["overall"]
            points.append(TimedPoint(first, value, row["pruner"], row["budget"]))
    full_ms = shape_rows(results, "scenes")[0]["ms"]["full"]["total"]["median"]
    value = 100 * accuracy["none"][196]["overall"]
    panels.points_by_time(axes, points, TimedPoint(full_ms, value, "all tokens", 196))
    axes.set_ylabel("questions answered right, %")
    axes.set_title("Accuracy against time")


def gains(axes: Axes, results: Path, shape: str = "minimind2-v-small") -> None:
    """Gains in time to first token, measured and predicted by the operation count."""
    rows = [row for row in shape_rows(results, shape) if row["budget"] <= row["tokens"] // 4]
    most = max(row["budget"] for row in rows)
    rows = sorted(
        (row for row in rows if row["budget"] == most),
        key=lambda row: row["gain"]["total"]["predicted"],
    )
    panels.gains(axes, [(row["pruner"], row["gain"]["total"]) for row in rows])
    axes.set_title(f"{shape}: gain with {most} of {rows[0]['tokens']} tokens")


def time_by_part(axes: Axes, results: Path) -> None:
    """For every shape, full and pruned to a quarter: each part's share of the full time."""
    bars: list[tuple[str, dict[str, float], float]] = []
    for shape in dict.fromkeys(row["shape"] for row in speed_rows(results)):
        rows = {
            r["pruner"]: r
            for r in shape_rows(results, shape)
            if r["budget"] == max(1, r["tokens"] // 4)
        }
        full = rows["tome"]["ms"]["full"]
        times = {"full": full, **{n: rows[n]["ms"]["pruned"] for n in BAR_METHODS if n in rows}}
        for name, ms in times.items():
            medians = {part: ms[part]["median"] for part in PARTS}
            bars.append((f"{shape}, {name}", medians, full["total"]["median"]))
    panels.bars_by_part(axes, bars)
    axes.set_title("Where the time goes, a quarter of the tokens kept")


def memory(axes: Axes, results: Path) -> None:
    """Cache size of the prompt against tokens kept, by shape.

    It is the same for all methods that select after the tower.
    """
    ends = []
    for shape, (colour, marker) in zip(
        dict.fromkeys(row["shape"] for row in speed_rows(results)), STRONG, strict=False
    ):
        rows = [row for row in shape_rows(results, shape) if row["pruner"] == "cls_attention"]
        points = [(100 * r["kept"] / r["tokens"], r["cache_bytes"]["pruned"]) for r in rows]
        points = sorted([*points, (100.0, rows[0]["cache_bytes"]["full"])])
        x, y = zip(*points, strict=True)
        axes.plot(x, np.array(y) / 1e6, color=colour, marker=marker, ms=5)
        ends.append((x[-1], y[-1] / 1e6, shape, colour))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("% of the visual tokens kept")
    axes.set_ylabel("the prompt's cache, MB")
    axes.set_title("Memory that grows with the tokens")
    label_lines(axes, ends, 0.07)


# A figure's name, how it is drawn, and its size in inches.
PANELS: dict[str, tuple[Callable[[Axes, Path], None], tuple[float, float]]] = {
    "accuracy-by-tokens": (accuracy_by_tokens, (6.8, 4.6)),
    "accuracy-by-time": (accuracy_by_time, (6.8, 4.6)),
    "kinds": (kinds, (6.2, 8.0)),
    "gains": (gains, (6.8, 3.6)),
    "where": (time_by_part, (6.8, 4.8)),
    "memory": (memory, (5.6, 4.0)),
}
DASHBOARD = "dashboard"
DASHBOARD_CELLS = (  # rows and columns of each panel
    ("accuracy-by-tokens", (0, 4), (0, 6)), ("accuracy-by-time", (0, 4), (9, 15)),
    ("gains", (4, 8), (1, 6)), ("where", (4, 8), (10, 16)),
    ("kinds", (0, 6), (18, 24)), ("memory", (6, 8), (18, 23)),
)  # fmt: skip


def draw(folder: Path = FIGURES, results: Path = RESULTS) -> None:
    """Write every figure, and the dashboard of all, into a folder."""
    with figure_style():
        for name, (panel, size) in PANELS.items():
            figure, axes = figure_with_axes(size)
            panel(axes, results)
            save_figure(figure, folder, name)
        figure, grid = figure_with_grid((23.4, 15.0), 8, 24)
        for name, (top, bottom), (left, right) in DASHBOARD_CELLS:
            PANELS[name][0](figure.add_subplot(grid[top:bottom, left:right]), results)
        speed = read(results, "speed")
        machine, versions = speed["machine"], speed["versions"]
        cpu, system = f"{machine['cpu']}, {machine['cores']} cores", machine["system"]
        where = f"{cpu}, {system}, MLX {versions['mlx']}"
        figure.suptitle(f"mlx_vlm_prune: what was measured ({where})", y=0.93, fontsize=13)
        save_figure(figure, folder, DASHBOARD)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a UserError ends in one sentence and exit code 2."""
    parser = Parser("benchmarks.figures", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=FIGURES, metavar="FOLDER", help="for the figures"
    )
    with in_one_sentence():
        draw(parser.parse_args(argv).out)


if __name__ == "__main__":
    main()
