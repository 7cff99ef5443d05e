"""The figures of a result of `sweep`, `evaluate` or `encode`: name, size and drawing of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.table import Row, label
from . import panels
from .measured import Encoding, Evaluation, Measured, Sweep, case_key
from .panels import TimedPoint

if TYPE_CHECKING:  # matplotlib may be missing until something is drawn
    from matplotlib.axes import Axes

PARTS = ("image", "vision", "pruner", "prefill")
Size = tuple[float, float]
WIDE: Size = (6.8, 4.6)
LINE_HEIGHT = 0.21  # inches of a row of a figure with a line for each case
AGREEMENT = "tokens that the answer shares with the full one, %"
IMAGE_TIME = "time of an image in a batch, ms"
ENCODED = {  # columns of a result of `encode`: the figure's name, its title and its axis
    "cosine": ("cosine", "Consistency", "cosine to the embedding of all tokens, x 100"),
    "same_text": ("same-text", "The same text", "images that choose the same text, %"),
    "accuracy": ("zero-shot", "Zero-shot accuracy", "images that choose the right text, %"),
}


@dataclass(frozen=True)
class PlannedFigure:
    """A figure that can be drawn; the size is in inches."""

    name: str
    title: str
    size: Size
    draw: Callable[[Axes], None]


def plan_figures(results: Sequence[Measured]) -> list[PlannedFigure]:
    """The figures of all results. Where several are of a kind, a figure's name ends with its
    file's."""
    figures: list[PlannedFigure] = []
    kinds = [type(result) for result in results]
    sweeps = [result for result in results if isinstance(result, Sweep)]
    for result in results:
        ending = [result] if kinds.count(type(result)) > 1 else []
        if isinstance(result, Sweep):
            figures += _named(_of_sweep(result), ending)
        elif isinstance(result, Encoding):
            figures += _named(_of_encoding(result), ending)
        elif isinstance(result, Evaluation):
            figures += _named(_of_evaluation(result), ending)
            for sweep in sweeps if not result.is_timed else ():
                both = [*ending, *([sweep] if len(sweeps) > 1 else [])]
                figures += _named(_of_both(result, sweep), both)
    return figures


def _named(
    figures: Iterator[PlannedFigure], results: Sequence[Measured]
) -> Iterator[PlannedFigure]:
    """The figures, with the names of their files."""
    for figure in figures:
        name = "-".join([figure.name, *(result.name for result in results)])
        title = "".join([figure.title, *(f", {result.name}" for result in results)])
        yield PlannedFigure(name, title, figure.size, figure.draw)


def _of_sweep(sweep: Sweep) -> Iterator[PlannedFigure]:
    rows, full = sweep.pruned, sweep.full
    tall: Size = (6.8, 1.6 + LINE_HEIGHT * len(rows))
    yield PlannedFigure(
        "speed-by-tokens", "Speed against tokens", WIDE, partial(_speed_by_tokens, sweep)
    )
    yield PlannedFigure(
        "agreement-by-tokens", "Agreement against tokens", WIDE,
        partial(_lines, sweep, lambda row: 100 * row["agreement"]["overlap"], AGREEMENT),
    )  # fmt: skip
    full_point, *points = [
        _timed(row, _first_token(row), 100 * row["agreement"]["overlap"]) for row in (full, *rows)
    ]
    yield PlannedFigure(
        "agreement-by-time", "Agreement against time", WIDE,
        partial(_points, points, full_point, AGREEMENT, panels.FIRST_TOKEN),
    )  # fmt: skip
    yield PlannedFigure("token-reduction", "What fewer tokens save", tall, partial(_savings, sweep))
    yield PlannedFigure("gains", "How much sooner the first token comes", tall,
                        partial(_gains, sweep))  # fmt: skip
    if all(full["ms"][part] for part in PARTS):
        height = 1.6 + LINE_HEIGHT * (1 + len(rows))
        yield PlannedFigure("time-by-part", "Where the time goes", (6.8, height),
                            partial(_time_by_part, sweep))  # fmt: skip


def _of_evaluation(evaluation: Evaluation) -> Iterator[PlannedFigure]:
    yield PlannedFigure(
        "accuracy-by-tokens", "Accuracy against tokens", WIDE,
        partial(_lines, evaluation, lambda row: evaluation.factor * row["overall"],
                evaluation.score_name),
    )  # fmt: skip
    at_quarter = [row for row in evaluation.pruned if row["tokens"] == evaluation.quarter]
    if len(evaluation.content["kinds"]) > 1 and evaluation.content["unit"] == "%":
        size = (2.6 + 0.6 * len(evaluation.content["kinds"]), 1.4 + LINE_HEIGHT * len(at_quarter))
        title = f"What {evaluation.quarter} of {evaluation.full['of']} tokens cost, by kind"
        yield PlannedFigure("kinds", title, size, partial(_kinds, evaluation, at_quarter))
    if evaluation.is_timed:
        full, *points = [
            _timed(row, row["first_token_ms"]["total"], evaluation.factor * row["overall"])
            for row in (evaluation.full, *evaluation.pruned)
        ]
        yield PlannedFigure(
            "accuracy-by-time", "Accuracy against time", WIDE,
            partial(_points, points, full, evaluation.score_name, panels.FIRST_TOKEN),
        )  # fmt: skip


def _of_encoding(encoding: Encoding) -> Iterator[PlannedFigure]:
    yield PlannedFigure(
        "encode-speed-by-tokens", "Speed against tokens", WIDE,
        partial(_lines, encoding, lambda row: row["ms"], IMAGE_TIME, lowest=True),
    )  # fmt: skip
    for column, (name, title, axis) in ENCODED.items():
        if column in encoding.full:
            value_of = partial(_percent_of, column)
            yield PlannedFigure(
                f"{name}-by-tokens", f"{title} against tokens", WIDE,
                partial(_lines, encoding, value_of, axis),
            )  # fmt: skip
            full, *points = [
                _timed(row, row["ms"], value_of(row)) for row in (encoding.full, *encoding.pruned)
            ]
            yield PlannedFigure(
                f"{name}-by-time", f"{title} against time", WIDE,
                partial(_points, points, full, axis, IMAGE_TIME),
            )  # fmt: skip


def _percent_of(column: str, row: Row) -> float:
    return 100 * float(row[column])


def _of_both(evaluation: Evaluation, sweep: Sweep) -> Iterator[PlannedFigure]:
    """Accuracy against time, of the cases that both have; nothing where the models differ."""
    if not evaluation.is_of_same_model(sweep):
        return
    judged = {case_key(row): evaluation.factor * row["overall"] for row in evaluation.rows}
    points = [
        _timed(row, _first_token(row), judged[case_key(row)])
        for row in sweep.pruned
        if case_key(row) in judged
    ]
    if points:
        value = evaluation.factor * evaluation.full["overall"]
        full = _timed(sweep.full, _first_token(sweep.full), value)
        yield PlannedFigure(
            "accuracy-by-time", "Accuracy against time", WIDE,
            partial(_points, points, full, evaluation.score_name, panels.FIRST_TOKEN),
        )  # fmt: skip


def _first_token(row: Row) -> float:
    """The median milliseconds in a sweep's row."""
    return float(row["ms"]["first_token"]["median"])


def _timed(row: Row, ms: float, value: float) -> TimedPoint:
    return TimedPoint(ms, value, label(row), row["tokens"])


def _by_method(result: Measured, value_of: Callable[[Row], Any]) -> dict[str, dict[float, Any]]:
    lines: dict[str, dict[float, Any]] = {}
    for row in result.pruned:
        lines.setdefault(label(row), {})[row["tokens"]] = value_of(row)
    return lines


def _lines(
    result: Measured, value_of: Callable[[Row], float], axis: str, axes: Axes,
    lowest: bool = False,
) -> None:  # fmt: skip
    lines, full = _by_method(result, value_of), result.full
    best = panels.best_methods(lines, result.quarter, lowest)
    panels.lines_by_tokens(axes, lines, (full["of"], value_of(full)), best, from_zero=lowest)
    axes.set_ylabel(axis)


def _speed_by_tokens(sweep: Sweep, axes: Axes) -> None:
    """Medians, with the deciles as bars."""
    _lines(sweep, _first_token, panels.FIRST_TOKEN, axes, lowest=True)
    for row in sweep.rows:
        ms = row["ms"]["first_token"]
        axes.vlines(row["tokens"], ms["p10"], ms["p90"], color=panels.GREY, lw=0.8)


def _points(
    points: Sequence[TimedPoint], full: TimedPoint, axis: str, time: str, axes: Axes
) -> None:
    panels.points_by_time(axes, points, full, time)
    axes.set_ylabel(axis)


def _case_name(row: Row) -> str:
    return f"{label(row)}, {row['tokens']}"


def _savings(sweep: Sweep, axes: Axes) -> None:
    rows = []
    for row in sweep.pruned:
        counts = {name: _less(sweep.full, row, name) for name in ("first_token", "total")}
        values = (1 - row["tokens"] / row["of"], row["operations_saved"], row["cache_saved"],
                  counts["first_token"], counts["total"])  # fmt: skip
        rows.append((_case_name(row), dict(zip(panels.SAVINGS, values, strict=True))))
    panels.savings(axes, rows)


def _less(full: Row, row: Row, part: str) -> float:
    """The share of full's time that a case took less, of medians."""
    full_ms, ms = (one["ms"][part]["median"] for one in (full, row))
    return float(1 - ms / full_ms)


def _gains(sweep: Sweep, axes: Axes) -> None:
    rows = [(_case_name(row), row["gain"]["first_token"]) for row in sweep.pruned]
    panels.gains(axes, rows[::-1])


def _time_by_part(sweep: Sweep, axes: Axes) -> None:
    whole = sweep.full["ms"]["first_token"]["median"]
    bars = []
    for row in sweep.rows:
        medians = {part: row["ms"][part]["median"] for part in PARTS if row["ms"][part]}
        bars.append(("full" if row is sweep.full else _case_name(row), medians, whole))
    panels.bars_by_part(axes, bars)


def _kinds(evaluation: Evaluation, rows: Sequence[Row], axes: Axes) -> None:
    kinds = [*evaluation.content["kinds"]]
    order = sorted(rows, key=lambda row: -row["overall"])
    full = evaluation.full["accuracy"]
    loss = np.array([[100 * (row["accuracy"][k] - full[k]) for k in kinds] for row in order])
    panels.differences(axes, [label(row) for row in order], kinds, loss)
