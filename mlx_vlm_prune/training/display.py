"""What a user sees of a run."""

from .trainer import Report


def show(report: Report) -> None:
    """The figures of a report on one line."""
    print(" ".join(f"{name} {value:.4g}" for name, value in report.items()), flush=True)
