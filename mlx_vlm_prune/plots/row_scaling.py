"""Time and memory of layers against the rows of a prompt, one figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.errors import missing_package
from ..checkpoints.reading.files import atomic_path
from ..planning.row_scaling import Measurement, by_layer
from .style import BLACK, STRONG, figure_style, figure_with_grid

KINDS = (".png", ".svg", ".pdf")
MARKS = (*STRONG, (BLACK, "x"))


def check_matplotlib() -> None:
    """UserError without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise missing_package("matplotlib", "the plot") from None


def draw(results: Sequence[Measurement], file: Path) -> None:
    """Write FILE, of one of KINDS; both axes are logarithmic."""
    with figure_style():
        figure, grid = figure_with_grid((9.5, 3.6), 1, 2)
        time, memory = (figure.add_subplot(grid[0, column]) for column in range(2))
        for (name, measured), mark in zip(by_layer(results).items(), MARKS, strict=False):
            _draw_layer(time, memory, name, list(measured.values()), mark)
        for axes, label in ((time, "ms of a layer"), (memory, "memory at its peak, MB")):
            axes.set(xscale="log", yscale="log", xlabel="rows of the prompt", ylabel=label)
        time.legend()
        with atomic_path(file, replace=True) as path:
            figure.savefig(path, format=file.suffix[1:])


def _draw_layer(
    time: Any, memory: Any, name: str, measured: Sequence[Measurement], mark: tuple[str, str]
) -> None:
    rows, (color, marker) = [one.rows for one in measured], mark
    median, fastest, slowest = zip(*(one.spread for one in measured), strict=True)
    time.plot(rows, median, color=color, marker=marker, label=name)
    time.fill_between(rows, fastest, slowest, alpha=0.2, color=color)
    megabytes = [one.peak_bytes / 1e6 for one in measured]
    if all(megabytes):
        memory.plot(rows, megabytes, color=color, marker=marker)
