"""Colours, markers, and rules of the figures, and how one is saved.

Colours are Okabe and Ito's for the colour-blind (Color Universal Design, 2008). Markers, hatches or
labels repeat what colours say, for print. Each figure is saved as SVG and as PNG.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # matplotlib may be missing until something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import atomic_path

BLACK, ORANGE, GREEN = "#000000", "#E69F00", "#009E73"
BLUE, RED, PINK = "#0072B2", "#D55E00", "#CC79A7"
GREY, PALE = "#8C8C8C", "#D0D0D0"
STRONG = ((BLUE, "o"), (RED, "s"), (GREEN, "^"), (PINK, "D"), (ORANGE, "v"))
BASELINES = {"random": "x", "uniform": "+", "avgpool": "1", "downsample": "2"}

RC_PARAMS: Any = {  # matplotlib types each key by itself
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#EBEBEB",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mlx_vlm_prune",  # the same figure is the same file
    "savefig.bbox": "tight",
}
# Without a date and a version the same figure is the same file.
FORMATS: dict[str, Any] = {
    "svg": {"metadata": {"Date": None}},
    "png": {"metadata": {"Software": None}, "dpi": 130},
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Inside the block figures have RC_PARAMS; a caller's own figures are as before."""
    import matplotlib

    with matplotlib.rc_context(RC_PARAMS):
        yield


def _empty_figure(size: tuple[float, float]) -> Figure:
    """A figure of a size in inches, which no window will show."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    return figure


def figure_with_axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure of a size in inches with one pair of axes."""
    figure = _empty_figure(size)
    return figure, figure.subplots()


def figure_with_grid(size: tuple[float, float], rows: int, columns: int) -> tuple[Figure, GridSpec]:
    """A figure of a size in inches with a grid for several pairs of axes."""
    figure = _empty_figure(size)
    return figure, figure.add_gridspec(rows, columns, hspace=1.0, wspace=0.6)


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Write FOLDER/NAME.svg and FOLDER/NAME.png. Raises UserError where that cannot be done."""
    make_folder(folder)
    for kind, options in FORMATS.items():
        with atomic_path(folder / f"{name}.{kind}", replace=True) as temporary:
            figure.savefig(temporary, format=kind, **options)


def make_folder(folder: Path) -> None:
    """Raises UserError where there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write into {folder}: {e.strerror or e}") from None


def label_lines(axes: Axes, ends: list[tuple[float, float, str, str]], gap: float) -> None:
    """Write each line's name beside its end (x, y, name, colour).

    Names stand at least `gap` of the axes' height apart.
    """
    axes.figure.canvas.draw()  # scales and limits are final only now
    points, label_height = 72 / axes.figure.dpi, float("inf")
    for x, y, text, colour in sorted(ends, key=lambda end: -end[1]):
        height = axes.transData.transform((x, y))[1]
        label_height = min(height, label_height - gap * axes.bbox.height)
        axes.annotate(
            text, (x, y), (8, (label_height - height) * points), textcoords="offset points",
            color=colour, va="center", fontsize=8, annotation_clip=False,
        )  # fmt: skip
