"""What is drawn into a pair of axes: lines over tokens, points over time, bars, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .style import (
    BASELINES,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    RED,
    STRONG,
    label_lines,
)

if TYPE_CHECKING:  # matplotlib may be missing until something is drawn
    from matplotlib.axes import Axes

LABELLED = len(STRONG)  # methods that a figure labels; the others are pale
Values = Mapping[float, float]  # by tokens


class TimedPoint(NamedTuple):
    """A method at a budget."""

    ms: float
    value: float
    name: str
    tokens: float


def best_methods(lines: Mapping[str, Values], tokens: float, lowest: bool = False) -> list[str]:
    """The LABELLED methods with the highest values at a number of tokens, baselines left out."""
    measured = [n for n, values in lines.items() if tokens in values and n not in BASELINES]
    return sorted(measured, key=lambda n: lines[n][tokens] * (1 if lowest else -1))[:LABELLED]


def lines_by_tokens(
    axes: Axes, lines: Mapping[str, Values], full: tuple[float, float], labelled: Sequence[str],
    from_zero: bool = False,
) -> None:  # fmt: skip
    """A line for each method, from `full` (tokens, value) on; the baselines and those `labelled`
    are named, the others pale."""
    strong = dict(zip(labelled, STRONG, strict=False))
    ends = []
    for name, values in lines.items():
        by_tokens = {**values, full[0]: full[1]}
        x = sorted(by_tokens)
        y = [by_tokens[k] for k in x]
        colour, marker = strong.get(name, (PALE, None))
        style, width, front = "-", 1.8 if name in strong else 0.8, 3 if name in strong else 1
        if name in BASELINES:
            colour, marker, style, width, front = GREY, BASELINES[name], "--", 1.2, 2
        axes.plot(x, y, style, color=colour, marker=marker, lw=width, ms=5, zorder=front)
        if name in strong or name in BASELINES:
            ends.append((x[0], y[0], name, colour))
    axes.axhline(full[1], color=BLACK, lw=0.8, ls=":")
    ticks = sorted({full[0], *(k for values in lines.values() for k in values)}, reverse=True)
    axes.set_xscale("log", base=2)
    axes.set_xlim(1.07 * full[0], 0.955 * ticks[-1])
    axes.set_xticks(*_spaced_ticks(ticks))
    axes.minorticks_off()
    axes.set_xlabel(f"visual tokens kept of {full[0]:g}")
    if from_zero:
        axes.set_ylim(bottom=0)
    label_lines(axes, ends, 0.045)


def _spaced_ticks(ticks: Sequence[float]) -> tuple[list[float], list[str]]:
    """The ticks that do not run into one another on a logarithmic axis, the largest first."""
    spaced = [ticks[0]]
    for tick in ticks[1:]:
        if tick <= 0.9 * spaced[-1]:
            spaced.append(tick)
    return spaced, [f"{tick:g}" for tick in spaced]


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (time, value) than which none is both faster and better, by time."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


FIRST_TOKEN = "time to the first token, ms (all parts inside)"


def points_by_time(
    axes: Axes, points: Sequence[TimedPoint], full: TimedPoint, time: str = FIRST_TOKEN
) -> None:
    """A point for each method and budget, full as a star, and the Pareto frontier."""
    everything = [*points, full]
    pareto = frontier([(point.ms, point.value) for point in everything])
    axes.step(*zip(*pareto, strict=True), where="post", color=BLUE, lw=1.4, zorder=1)
    budgets = sorted({point.tokens for point in points}, reverse=True)
    for number, tokens in enumerate(budgets):
        colour, marker = STRONG[number % len(STRONG)]
        of_budget = [point for point in points if point.tokens == tokens]
        _scatter(axes, of_budget, s=18, c=colour, marker=marker, label=f"{tokens:g} tokens",
                 zorder=2)  # fmt: skip
    _scatter(axes, [full], s=40, c=BLACK, marker="*", label=f"all {full.tokens:g}", zorder=3)
    if random := [point for point in points if point.name == "random"]:
        _scatter(axes, random, s=70, c="none", edgecolors=BLACK, label="random", zorder=3)
    _number_points(axes, sorted(p for p in everything if (p.ms, p.value) in pareto))
    axes.set_xlabel(time)
    axes.legend(loc="lower right")


def _scatter(axes: Axes, points: Sequence[TimedPoint], **style: Any) -> None:
    axes.scatter([point.ms for point in points], [point.value for point in points], **style)


def _number_points(axes: Axes, points: Sequence[TimedPoint]) -> None:
    """Write numbers beside the frontier's points, and their names in the margin."""
    for number, point in enumerate(points, 1):
        place = (point.ms, point.value)
        axes.annotate(str(number), place, (-3, 5), textcoords="offset points", ha="right")
    names = [f"{i}  {point.name}, {point.tokens:g}" for i, point in enumerate(points, 1)]
    axes.text(1.03, 1, "\n".join(["on the frontier:", *names]), transform=axes.transAxes, va="top",
              fontsize=8, linespacing=1.5)  # fmt: skip


def gains(axes: Axes, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Gains by method (name, gain of a result), measured and, where counted, by operations."""
    for place, (_, gain) in enumerate(rows):
        middle = gain["realised"] or (gain["p10"] + gain["p90"]) / 2
        if predicted := gain["predicted"]:
            axes.plot([middle, predicted], [place, place], color=PALE, lw=3, zorder=1)
            axes.scatter(predicted, place, c=BLACK, marker="|", s=90, zorder=3)
        axes.plot([gain["p10"], gain["p90"]], [place, place], color=BLUE, lw=1, zorder=2)
        axes.scatter(middle, place, c=BLUE, marker="o", s=30, zorder=3)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.axvline(1, color=GREY, lw=0.8, ls=":")
    axes.set_xlabel("times as fast to the first token (● measured, | counted)")


PART_STYLES = tuple(
    zip((GREY, BLUE, BLACK, GREEN, ORANGE), ("", "//", "", "xx", "\\\\"), strict=True)
)


def bars_by_part(axes: Axes, bars: Sequence[tuple[str, Mapping[str, float], float]]) -> None:
    """Bars (name, value of each part, the whole) of parts as shares of the whole; a bar whose name
    ends with "full" begins a group."""
    parts = [*dict.fromkeys(part for _, values, _ in bars for part in values)]
    begin = np.zeros(len(bars))
    for part, (colour, hatch) in zip(parts, PART_STYLES, strict=False):
        share = np.array([100 * values.get(part, 0.0) / whole for _, values, whole in bars])
        axes.barh(range(len(bars)), share, left=begin, color=colour, hatch=hatch, label=part,
                  edgecolor="white", lw=0.3)  # fmt: skip
        begin += share
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=7.5)
    for place, (name, _, _) in enumerate(bars):
        if name.endswith("full"):
            axes.get_yticklabels()[place].set_fontweight("bold")
            axes.axhline(place - 0.5, color=GREY, lw=0.6)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlabel("% of the time to the first token with all tokens")
    _legend_below(axes, 5)


def differences(axes: Axes, names: Sequence[str], kinds: Sequence[str], loss: np.ndarray) -> None:
    """Points lost by each kind of question, (names, kinds); baselines are bold."""
    image = axes.imshow(loss, cmap="cividis", vmin=-60, vmax=0, aspect="auto")
    for (row, column), value in np.ndenumerate(loss):
        ink = "white" if value < -30 else "black"
        axes.text(column, row, str(round(value)), ha="center", va="center", fontsize=7, color=ink)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_yticks(range(len(names)), names, fontsize=7.5)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in BASELINES else "normal")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.figure.colorbar(image, ax=axes, label="points lost, of 100", fraction=0.04, pad=0.02)


SAVINGS = {  # the heading of each, with its colour and marker
    "visual tokens": (BLACK, "|"), "operations": (ORANGE, "s"), "cache": (GREEN, "^"),
    "time to first token": (BLUE, "o"), "time of the answer": (RED, "D"),
}  # fmt: skip


def savings(axes: Axes, rows: Sequence[tuple[str, Mapping[str, float | None]]]) -> None:
    """For each case (name, share saved by each of SAVINGS) what fewer tokens have saved."""
    for place, (_, shares) in enumerate(rows):
        present = [100 * share for share in shares.values() if share is not None]
        axes.plot([min(present), max(present)], [place, place], color=PALE, lw=2, zorder=1)
    for name, (colour, marker) in SAVINGS.items():
        places = [i for i, (_, shares) in enumerate(rows) if shares.get(name) is not None]
        values = [100 * (rows[i][1][name] or 0.0) for i in places]
        if places:
            axes.scatter(values, places, c=colour, marker=marker, s=34, label=name, zorder=2)
    axes.axvline(0, color=GREY, lw=0.8, ls=":")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("% less than with all tokens")
    _legend_below(axes, 3)


def _legend_below(axes: Axes, columns: int) -> None:
    """The legend, half an inch below the axes: under their label, whatever their height."""
    inches = axes.bbox.height / axes.figure.dpi
    place = (0.45, -0.5 / inches)
    axes.legend(ncols=columns, loc="upper center", bbox_to_anchor=place, fontsize=8)
