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
from mlx_vlm_prune.pruners import METHODS
from mlx_vlm_prune.scenes import KINDS

from .figure_style import (
    BASELINES,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    STRONG,
    figure_with_axes,
    figure_with_grid,
    label_lines,
    save_figure,
)
from .readme_tables import read, speed_rows
from .report import RESULTS, ROOT, scenes
from .timing import PARTS

if TYPE_CHECKING:  # matplotlib may be missing until something is drawn
    from matplotlib.axes import Axes

FIGURES = ROOT / "docs" / "figures"
LABELLED = 5  # methods that a figure labels; the others are pale
QUARTER = 49  # tokens, of 196
BAR_METHODS = ("cls_attention", "tome", "downsample")  # all shapes were timed with them


def single_methods(accuracy: dict) -> dict:
    """Results of single methods with default options: no chain and no baseline `none`."""
    return {name: rows for name, rows in accuracy.items() if name in METHODS and name != "none"}


def best_methods(accuracy: dict, tokens: int) -> list[str]:
    """The LABELLED most accurate methods at a number of tokens, baselines left out."""
    measured = [
        n for n, rows in single_methods(accuracy).items() if tokens in rows and n not in BASELINES
    ]
    return sorted(measured, key=lambda name: -accuracy[name][tokens]["overall"])[:LABELLED]


def accuracy_by_tokens(axes: Axes, results: Path) -> None:
    """A line for each method; the baselines and the best at a quarter are labelled."""
    accuracy = scenes(results)
    full = accuracy["none"][196]["overall"]
    strong = dict(zip(best_methods(accuracy, QUARTER), STRONG, strict=True))
    ends = []
    for name, rows in single_methods(accuracy).items():
        by_tokens = {**rows, 196: accuracy["none"][196]}
        x = sorted(by_tokens)
        y = [100 * by_tokens[k]["overall"] for k in x]
        colour, marker = strong.get(name, (PALE, None))
        style, width, front = "-", 1.8 if name in strong else 0.8, 3 if name in strong else 1
        if name in BASELINES:
            colour, marker, style, width, front = GREY, BASELINES[name], "--", 1.2, 2
        axes.plot(x, y, style, color=colour, marker=marker, lw=width, ms=5, zorder=front)
        if name in strong or name in BASELINES:
            ends.append((x[0], y[0], name, colour))
    axes.axhline(100 * full, color=BLACK, lw=0.8, ls=":")
    axes.set_xscale("log", base=2)
    axes.set_xlim(210, 21)
    axes.set_xticks([196, 98, 49, 22], ["196", "98", "49", "22"])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens kept of 196")
    axes.set_ylabel("questions answered right, %")
    axes.set_title("Accuracy against tokens")
    label_lines(axes, ends, 0.045)


def kinds(axes: Axes, results: Path, tokens: int = QUARTER) -> None:
    """Accuracy lost by each kind of question; a row for each method, the best first."""
    accuracy = scenes(results)
    full = accuracy["none"][196]["accuracy"]
    measured = {
        name: rows[tokens] for name, rows in single_methods(accuracy).items() if tokens in rows
    }
    order = sorted(measured, key=lambda name: -measured[name]["overall"])
    loss = np.array([[100 * (measured[n]["accuracy"][k] - full[k]) for k in KINDS] for n in order])
    image = axes.imshow(loss, cmap="cividis", vmin=-60, vmax=0, aspect="auto")
    for (row, column), value in np.ndenumerate(loss):
        ink = "white" if value < -30 else "black"
        axes.text(column, row, str(round(value)), ha="center", va="center", fontsize=7, color=ink)
    axes.set_xticks(range(len(KINDS)), KINDS)
    axes.set_yticks(range(len(order)), order, fontsize=7.5)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in BASELINES else "normal")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.figure.colorbar(image, ax=axes, label="points lost, of 100", fraction=0.04, pad=0.02)
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
            points.append((first, 100 * judged["overall"], row["pruner"], row["budget"]))
    full = shape_rows(results, "scenes")[0]["ms"]["full"]["total"]["median"]
    points.append((full, 100 * accuracy["none"][196]["overall"], "all tokens", 196))
    pareto = frontier([point[:2] for point in points])
    axes.step(*zip(*pareto, strict=True), where="post", color=BLUE, lw=1.4, zorder=1)
    for tokens, (colour, marker) in zip((98, 49, 22), STRONG, strict=False):
        budget = [point for point in points if point[3] == tokens]
        axes.scatter([p[0] for p in budget], [p[1] for p in budget], s=18, c=colour, marker=marker,
                     label=f"{tokens} tokens", zorder=2)  # fmt: skip
    axes.scatter(*points[-1][:2], s=40, c=BLACK, marker="*", label="all 196", zorder=3)
    random = [point for point in points if point[2] == "random"]
    axes.scatter([p[0] for p in random], [p[1] for p in random], s=70, c="none",
                 edgecolors=BLACK, label="random", zorder=3)  # fmt: skip
    _number_points(axes, sorted(point for point in points if point[:2] in pareto))
    axes.set_xlabel("time to the first token, ms (all parts inside)")
    axes.set_ylabel("questions answered right, %")
    axes.set_title("Accuracy against time")
    axes.legend(loc="lower right")


def _number_points(axes: Axes, points: Sequence[tuple[float, float, str, int]]) -> None:
    """Write numbers beside the frontier's points, and their names in the margin."""
    for number, (x, y, _, _) in enumerate(points, 1):
        axes.annotate(str(number), (x, y), (-3, 5), textcoords="offset points", ha="right")
    names = [f"{i}  {name}, {tokens}" for i, (_, _, name, tokens) in enumerate(points, 1)]
    axes.text(1.03, 1, "\n".join(["on the frontier:", *names]), transform=axes.transAxes, va="top",
              fontsize=8, linespacing=1.5)  # fmt: skip


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (time, accuracy) than which none is both faster and better, by time."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


def gains(axes: Axes, results: Path, shape: str = "minimind2-v-small") -> None:
    """Gains in time to first token, measured and predicted by the operation count."""
    rows = [row for row in shape_rows(results, shape) if row["budget"] <= row["tokens"] // 4]
    most = max(row["budget"] for row in rows)
    rows = sorted(
        (row for row in rows if row["budget"] == most),
        key=lambda row: row["gain"]["total"]["predicted"],
    )
    for place, row in enumerate(rows):
        gain = row["gain"]["total"]
        middle = gain["realised"] or (gain["p10"] + gain["p90"]) / 2
        axes.plot([middle, gain["predicted"]], [place, place], color=PALE, lw=3, zorder=1)
        axes.plot([gain["p10"], gain["p90"]], [place, place], color=BLUE, lw=1, zorder=2)
        axes.scatter(middle, place, c=BLUE, marker="o", s=30, zorder=3)
        axes.scatter(gain["predicted"], place, c=BLACK, marker="|", s=90, zorder=3)
    axes.set_yticks(range(len(rows)), [row["pruner"] for row in rows])
    axes.axvline(1, color=GREY, lw=0.8, ls=":")
    axes.set_xlabel("times as fast to the first token (● measured, | counted)")
    axes.set_title(f"{shape}: gain with {most} of {rows[0]['tokens']} tokens")


def time_by_part(axes: Axes, results: Path) -> None:
    """For every shape, full and pruned to a quarter: each part's share of the full time."""
    colours, hatches = (GREY, BLUE, BLACK, GREEN, ORANGE), ("", "//", "", "xx", "\\\\")
    part_styles = zip(PARTS, colours, hatches, strict=True)
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
    begin = np.zeros(len(bars))
    for part, colour, hatch in part_styles:
        share = np.array([100 * medians[part] / full for _, medians, full in bars])
        axes.barh(range(len(bars)), share, left=begin, color=colour, hatch=hatch, label=part,
                  edgecolor="white", lw=0.3)  # fmt: skip
        begin += share
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=7.5)
    for place, (name, _, _) in enumerate(bars):
        if name.endswith(", full"):
            axes.get_yticklabels()[place].set_fontweight("bold")
            axes.axhline(place - 0.5, color=GREY, lw=0.6)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlabel("% of the time to the first token with all tokens")
    axes.set_title("Where the time goes, a quarter of the tokens kept")
    axes.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.45, -0.1), fontsize=8)


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
    for name, (panel, size) in PANELS.items():
        figure, axes = figure_with_axes(size)
        panel(axes, results)
        save_figure(figure, folder, name)
    figure, grid = figure_with_grid((23.4, 15.0), 8, 24)
    for name, (top, bottom), (left, right) in DASHBOARD_CELLS:
        PANELS[name][0](figure.add_subplot(grid[top:bottom, left:right]), results)
    speed = read(results, "speed")
    machine, versions = speed["machine"], speed["versions"]
    where = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, MLX {versions['mlx']}"
    )
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
