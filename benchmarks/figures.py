"""Draw what was measured: `python -m benchmarks.figures`.

From benchmarks/results to docs/figures, each as SVG and PNG: accuracy against tokens, and what
each kind of question loses.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from mlx_vlm_prune.pruners import METHODS
from mlx_vlm_prune.scenes import KINDS

from .report import RESULTS, ROOT, scenes
from .style import BASELINES, BLACK, GREY, PALE, STRONG, canvas, name_ends, save

FIGURES = ROOT / "docs" / "figures"
NAMED = 5  # methods that a figure names; the others are pale
QUARTER = 49  # tokens, of 196


def singles(found: dict) -> dict:
    """Methods on their own, chains and those with options left out."""
    return {name: rows for name, rows in found.items() if name in METHODS and name != "none"}


def best(found: dict, tokens: int) -> list[str]:
    """The methods that answer most with so many tokens, baselines left out."""
    able = [n for n, rows in singles(found).items() if tokens in rows and n not in BASELINES]
    return sorted(able, key=lambda name: -found[name][tokens]["overall"])[:NAMED]


def accuracy_by_tokens(axes: Axes, results: Path) -> None:
    """A line a method; the baselines and the best at a quarter are named."""
    found = scenes(results)
    full = found["none"][196]["overall"]
    strong = dict(zip(best(found, QUARTER), STRONG, strict=True))
    ends = []
    for name, rows in singles(found).items():
        told = {**rows, 196: found["none"][196]}
        x = sorted(told)
        y = [100 * told[k]["overall"] for k in x]
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
    name_ends(axes, ends, 0.045)


def kinds(axes: Axes, results: Path, tokens: int = QUARTER) -> None:
    """What each kind of question loses, a row a method, the gentlest first."""
    found = scenes(results)
    full = found["none"][196]["accuracy"]
    able = {name: rows[tokens] for name, rows in singles(found).items() if tokens in rows}
    order = sorted(able, key=lambda name: -able[name]["overall"])
    loss = np.array([[100 * (able[n]["accuracy"][k] - full[k]) for k in KINDS] for n in order])
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


# A figure's name, how it is drawn, and its size in inches.
PANELS: dict[str, tuple[Callable[[Axes, Path], None], tuple[float, float]]] = {
    "accuracy-by-tokens": (accuracy_by_tokens, (6.8, 4.6)),
    "kinds": (kinds, (6.2, 8.0)),
}


def draw(folder: Path = FIGURES, results: Path = RESULTS) -> None:
    """Write every figure into a folder."""
    for name, (panel, size) in PANELS.items():
        figure, axes = canvas(size)
        panel(axes, results)
        save(figure, folder, name)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=FIGURES, metavar="FOLDER")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
