"""Draw what `sweep`, `evaluate` and `encode` have measured, as PNG and SVG, with a page of all.

mlx-vlm-prune plot sweep.json evaluation.json --out figures

Of a sweep: speed, agreement and savings against tokens and time, gains, and each part's time.
Of an evaluation: accuracy against tokens and by kind of question; against time, with the Pareto
frontier, where it has first-token times or a sweep of the same model is given too. Of `encode`:
speed, consistency and zero-shot accuracy.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from .checkpoints.command_line import Parser, in_one_sentence
from .checkpoints.errors import UserError
from .checkpoints.reading.files import write_atomically
from .plots.figures import PlannedFigure, plan_figures
from .plots.measured import Evaluation, Measured, Sweep, case_key, read_result
from .plots.page import dashboard
from .plots.style import figure_style, figure_with_axes, make_folder, save_figure

logger = logging.getLogger("mlx_vlm_prune")
PAGE = "dashboard.html"
DESCRIPTION = """Draw what `sweep`, `evaluate` and `encode` have measured: each figure as PNG and as
SVG, and a page of all."""
EPILOG = "example: mlx-vlm-prune plot sweep.json evaluation.json --out figures"


# fmt: off
def build_parser() -> Parser:
    """The command line of `plot`."""
    parser = Parser("mlx_vlm_prune.plot", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="FILE.json",
        help="results of `sweep`, `evaluate` and `encode`")
    add("--out", type=Path, default=Path("figures"), metavar="FOLDER",
        help="folder of the figures; existing ones are replaced")
    return parser
# fmt: on


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Read all results, then draw and write."""
    with figure_style():  # says first what is not installed
        names = [path.stem for path in args.results]
        if len(set(names)) < len(names):
            raise UserError("two results have the same file name, by which figures are told apart")
        results = [read_result(path) for path in args.results]
        explain_what_is_missing(results)
        figures = plan_figures(results)
        make_folder(args.out)
        written = 0
        try:
            for figure in tqdm(figures, "figures", file=sys.stderr, leave=False, delay=2):
                draw(figure, args.out)
                written += 1
        except KeyboardInterrupt:
            print(f"\ninterrupted: {written} of {len(figures)} figures are written",
                  file=sys.stderr)  # fmt: skip
            sys.exit(130)
    write_atomically(args.out / PAGE, dashboard(figures, results, args.out))
    for figure in figures:
        print(f"{args.out / figure.name}.png, .svg: {figure.title}")
    print(f"Wrote {args.out / PAGE}")


def draw(figure: PlannedFigure, folder: Path) -> None:
    """Write one figure as PNG and SVG."""
    drawing, axes = figure_with_axes(figure.size)
    figure.draw(axes)
    axes.set_title(figure.title)
    save_figure(drawing, folder, figure.name)


def explain_what_is_missing(results: Sequence[Measured]) -> None:
    """A note for each evaluation and sweep that cannot be joined to accuracy against time."""
    sweeps = [result for result in results if isinstance(result, Sweep)]
    for evaluation in results:
        if not isinstance(evaluation, Evaluation) or evaluation.is_timed:
            continue
        for sweep in sweeps:
            common = {*map(case_key, evaluation.pruned)} & {*map(case_key, sweep.pruned)}
            if not evaluation.is_of_same_model(sweep):
                models = [result.content["model"] for result in (evaluation, sweep)]
                why = "one is of {}, the other of {}".format(*models)
            elif not common:
                why = "they have no method at one budget in common"
            else:
                continue
            logger.info("no accuracy against time of %s and %s: %s",
                        evaluation.name, sweep.name, why)  # fmt: skip


if __name__ == "__main__":
    main()
