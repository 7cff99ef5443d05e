"""Does pruning pay, for this model on this machine? `mlx-vlm-prune advise` measures it.

The time of each part is measured. What pruning in each stage could gain follows from that and from
the operation counts, for a model of mlx-vlm's from the times of smaller pictures. The largest
evaluation of this model gives the frontier of methods.
"""

import argparse
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .checkpoints.command_line import Parser, in_one_sentence
from .checkpoints.errors import UserError
from .checkpoints.reading.files import check_target, read_json, write_atomically
from .generation.photographs import warn_of_photographs
from .hosts.loading import load
from .inputs.image_sources import DATA_URI, check_is_file
from .machine.hardware import describe_machine, versions
from .machine.remembered import FEWEST, remembered
from .models.loading import DTYPES
from .models.vlm import VLM
from .planning import host_times, times
from .planning.times import INSIDE_TOWER, SMALLER_IMAGE, Times
from .scenes import compose

SAMPLE_SEED = 1_000_000_007
LEAST_SPEEDUP, MOST_LOSS = 1.1, 0.02  # below the speedup, or above the loss, pruning does not pay
EVALUATE = "mlx-vlm-prune evaluate"
DESCRIPTION = "Measure whether pruning pays, for a model on this machine, and recommend a method."


@dataclass(frozen=True)
class Advice:
    """Measured times, the frontier of methods, and the `lines` that report them."""

    model: str
    tokens: int
    kept: int
    times: Times
    cache_bytes: tuple[int, int]  # full, and with `kept` tokens
    frontier: list[dict[str, Any]] = field(default_factory=list)
    questions: str = ""
    count: int = 0  # of the questions
    date: str = ""  # when they were asked
    full: float = 1.0  # their score with all tokens
    inside_tower: str = ""  # what is said of methods there where their time is not predicted
    image: str | None = None  # that was measured, a file

    @property
    def lines(self) -> list[str]:
        t, full_mb, kept_mb = self.times, *(n / 1e6 for n in self.cache_bytes)
        share = {name: getattr(t, name) / t.total for name in ("image", "vision", "prefill")}
        speedups = {stage: t.total / ms for stage, ms in t.first.items()}
        return [
            f"{self.model} on this machine, with all {self.tokens} visual tokens of an image: "
            f"{t.total:.0f} ms to the first token, {t.token:.1f} ms for each further one.",
            f"Of the time to the first token, opening the image takes {share['image']:.0%}, the "
            f"vision tower {share['vision']:.0%}, projector and prompt {share['prefill']:.0%}.",
            f"After the tower a method that keeps {self.kept} tokens should make the first token "
            f"{speedups['behind']:.2f} x as fast; with no token left it would be "
            f"{t.most_speedup:.2f} x.",
            self._tower_line(speedups),
            f"The cache of the prompt: {full_mb:.1f} MB, with {self.kept} tokens {kept_mb:.1f} MB.",
            *self._frontier_lines(),
            self.recommendation,
        ]

    def _tower_line(self, speedups: Mapping[str, float]) -> str:
        """What fewer patches in the tower could win."""
        smaller = f"{speedups.get('smaller', 0):.2f} x"
        if "inside" in speedups:
            return (
                f"Inside the tower ({INSIDE_TOWER}) it should be {speedups['inside']:.2f} x, with "
                f"a smaller image ({SMALLER_IMAGE}) {smaller}, by the operation count."
            )
        line = f"Inside the tower {self.inside_tower}"
        if "smaller" in speedups:
            return f"{line}; a smaller image (--resize-shape), half as wide, should give {smaller}."
        return f"{line}; a smaller image has as many visual tokens."

    def _frontier_lines(self) -> list[str]:
        when = f"of {self.date[:16].replace('T', ' ')}" if self.date else "without a date"
        about = f"the evaluation {when} ({self.questions}, {self.count} questions)"
        if not self.frontier and self.count:
            return [f"In {about} no method is better than random."]
        if not self.frontier:
            return [f"What pruning costs in answers was not measured: {EVALUATE}{self._model}"]
        losses = [100 * row["to_full"]["overall"][0] for row in self.frontier]
        methods = "; ".join(
            f"{row['pruner']} with {row['tokens']} ({loss:+.1f} points)"
            for row, loss in zip(self.frontier, losses, strict=True)
        )
        return [
            f"In {about} no method was both more often right and left fewer tokens than these"
            f" (percentage points beside all tokens): {methods}."
        ]

    @property
    def _model(self) -> str:
        return "" if self.model == "scenes" else f" --model {self.model}"

    @property
    def recommendation(self) -> str:
        """A command to copy, or a reason not to prune."""
        first = dict(self.times.first)
        smaller = first.pop("smaller", None)
        speedup = self.times.total / min(first.values())
        if speedup < LEAST_SPEEDUP:
            advice = f"Advice: do not prune; at best it would be {speedup:.2f} x as fast here."
            if smaller and self.times.total / smaller >= LEAST_SPEEDUP:
                way = SMALLER_IMAGE if "inside" in first else "--resize-shape"
                return f"{advice} Only a smaller image ({way}) should gain."
            return advice
        safe = [row for row in self.frontier if self._is_safe(row)]
        is_file = self.image is not None and not self.image.startswith(DATA_URI)
        image = shlex.quote(str(self.image)) if is_file else "photo.jpg"
        command = f"mlx-vlm-prune generate{self._model} --image {image} --prompt '…'"
        if not self.frontier and not self.count:
            return f"Advice: evaluate first; then {command} --keep-ratio 0.25"
        if self.count < FEWEST or self.full <= 0:
            fault = f"only {self.count} questions" if self.count < FEWEST else "no right answer"
            return f"Advice: evaluate again; with {fault} the largest one says nothing."
        if not safe:
            return (
                f"Advice: do not prune; every method may lose more than {MOST_LOSS:.0%} of the"
                " answers (95 % interval) at the budgets that were evaluated."
            )
        best = min(safe, key=lambda row: row["tokens"])
        ratio = best.get("keep_ratio")
        budget = f"--keep-ratio {ratio:g}" if ratio else f"--keep-tokens {best['tokens']}"
        return f"Advice: {command} --pruner {best['pruner']} {budget}"

    @staticmethod
    def _is_safe(row: Mapping[str, Any]) -> bool:
        """Whether the interval excludes a loss above MOST_LOSS."""
        low = row["to_full"]["overall"][1]
        return low is not None and low >= -MOST_LOSS


def frontier(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that no other row dominates: better with as few tokens, or as good with fewer.

    Most tokens first, without full, and without what nobody should choose: `random`, and what is
    below it.
    """
    pruned = [
        row
        for row in rows
        if row["pruner"].partition(":")[0] not in ("none", "random")
        and row["tokens"] < row["of"]
        and not _is_below_random(row)
    ]
    best: list[Mapping[str, Any]] = []
    for row in sorted(pruned, key=lambda row: (row["tokens"], -row["overall"])):
        if not best or row["overall"] > best[-1]["overall"]:
            best.append(row)
    return best[::-1]


def _is_below_random(row: Mapping[str, Any]) -> bool:
    """Whether the interval of the difference to `random` with the same budget excludes more."""
    high = row.get("to_random", {}).get("overall", (0, None, None))[2]
    return high is not None and high < 0


def load_evaluation(folder: Path | None, file: Path | None) -> dict[str, Any]:
    """The evaluation in a file, else the largest one of the model in `folder`, else nothing.

    Raises UserError for a file that is no evaluation.
    """
    paths = [file] if file else remembered(folder) if folder else []
    if not paths:
        return {}
    path = paths[0]
    try:
        evaluation = read_json(path, most=None)
        for row in evaluation["rows"]:  # fails where a figure is missing
            row["pruner"], row["tokens"] + row["of"], row["overall"] + row["to_full"]["overall"][0]
            row["to_full"]["overall"][1], (row.get("keep_ratio") or 0) + 0
    except (KeyError, TypeError, IndexError) as e:
        raise UserError(f"{path} is no evaluation ({e}); {EVALUATE} writes one") from None
    return evaluation


def advise(
    model: Any, processor: Any, image: Any, evaluation: Mapping[str, Any], name: str | None = None
) -> Advice:
    """Measure the model, which takes seconds to minutes and shows progress, and add the frontier.

    `name` is what the user calls a model of mlx-vlm's; else it is its folder.
    """
    is_ours = isinstance(model, VLM)
    measured = (times if is_ours else host_times).measure(model, processor, image)
    columns = ("pruner", "tokens", "of", "keep_ratio", "overall", "to_full")
    rows = [
        {name: row[name] for name in columns if name in row}
        for row in frontier(evaluation.get("rows", ()))
    ]
    full = [row["overall"] for row in evaluation.get("rows", ()) if row["pruner"] == "none"]
    return Advice(
        processor.name if is_ours else str(name or model.model_path), measured.tokens,
        measured.kept, measured.times, measured.cache_bytes, rows,
        str(evaluation.get("questions", "")),
        int(evaluation.get("count", 0)), str(evaluation.get("date", "")), max(full, default=0.0),
        measured.inside_tower,
        str(image) if isinstance(image, str | os.PathLike) else None,
    )  # fmt: skip


# fmt: off
def build_parser() -> Parser:
    """The command line of `advise`."""
    parser = Parser("mlx_vlm_prune.advise", description=DESCRIPTION)
    add = parser.add_argument
    add("--model", help="folder or Hugging Face name (default: the built-in scenes model)")
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="type of the weights and of the computation; auto is float32 on a CPU and the"
        " checkpoint's own type on a GPU")
    add("--image", metavar="FILE", help="an image like yours (default: a drawn scene)")
    add("--evaluation", type=Path, metavar="FILE.json",
        help="a result of `evaluate` (default: the largest one of this model)")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    return parser
# fmt: on


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Load the model, measure, print and write."""
    if args.json:
        check_target(args.json, replace=True)
    if args.image:
        check_is_file(args.image)
    model, processor = load(args.model, dtype=args.dtype)
    folder = processor.folder if isinstance(model, VLM) else model.model_path
    evaluation = load_evaluation(folder, args.evaluation)
    if args.image:
        warn_of_photographs(processor, [args.image])
    image = args.image or compose(SAMPLE_SEED).image()
    advice = advise(model, processor, image, evaluation, args.model)
    print("\n".join(advice.lines))
    if args.json:
        machine = {"machine": describe_machine(), "versions": versions()}
        figures = {"command": "advise", **asdict(advice), **machine}
        write_atomically(args.json, json.dumps(figures, indent=4, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
