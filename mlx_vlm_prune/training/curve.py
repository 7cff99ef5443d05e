"""The curve of a run: losses over steps, and answers that are right, as PNG and SVG."""

from pathlib import Path

from ..checkpoints.errors import missing_package
from ..checkpoints.reading.files import atomic_path
from .metrics import Metrics

NAME = "curve"
LOSSES = {"train_loss": "training", "val_loss": "held out"}
SHARES = {"val_accuracy": "right, all tokens", "val_accuracy_pruned": "right, pruned"}


def draw_curve(metrics: Metrics, folder: Path) -> list[Path]:
    """Write FOLDER/curve.png and .svg; nothing where there are no two points to join.

    Raises UserError where matplotlib is not installed, or nothing can be written.
    """
    if max(len(metrics.column(name)[0]) for name in LOSSES) < 2:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_package("matplotlib", "the curve") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in LOSSES.items():
        steps, values = metrics.column(name)
        if steps:
            axes.plot(steps, values, label=label, marker="o" if name != "train_loss" else "")
    axes.set(xlabel="steps", ylabel="loss of an answer's token")
    if metrics.column("val_accuracy")[0]:
        right = axes.twinx()
        for color, (name, label) in zip(("tab:green", "tab:red"), SHARES.items(), strict=True):
            steps, values = metrics.column(name)
            if steps:
                shares = [100 * value for value in values]
                right.plot(steps, shares, label=label, color=color, linestyle="--", marker=".")
        right.set(ylabel="answers right, %", ylim=(0, 104))  # a line at 100 % is seen
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    files = [folder / f"{NAME}.{kind}" for kind in ("png", "svg")]
    for file in files:
        with atomic_path(file, replace=True) as path:
            figure.savefig(path, format=file.suffix[1:])
    return files
