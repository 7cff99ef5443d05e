"""Options of `evaluate` that say which questions are asked."""

import argparse
from functools import partial
from pathlib import Path

from ..checkpoints.command_line import Parser
from ..checkpoints.errors import UserError
from ..generation.arguments import add_max_pixels
from .first_look import ALL_PER_KIND, PER_KIND, QUESTIONS, limit_of, per_kind_of
from .question_set import QuestionSet
from .questions import DRAWN, FORMATS, Source, format_of
from .scoring_options import with_judge


# fmt: off
def add_questions(parser: Parser) -> None:
    """The group of these options."""
    add = parser.add_argument_group("questions").add_argument
    add("--questions", default="scenes", metavar="PATH",
        help=f"a file or folder, or built-in ones: {', '.join(DRAWN)}")
    add("--format", metavar="NAME",
        help=f"format of that file: {', '.join(FORMATS)} (default: own)")
    add("--images", type=Path, metavar="FOLDER",
        help="folder of the images (default: beside the questions)")
    add_max_pixels(add)
    add("--split", metavar="NAME",
        help="split of RefCOCO (default: all but train), ScienceQA (test), VQAv2 (val2014) or MMMU"
        " (validation)")
    add("--boxes", choices=("unit", "thousand", "pixels"),
        help="coordinates in RefCOCO's questions and answers: 0 to 1, 0 to 1000, or pixels"
        " (default: unit)")
    add("--per-kind", type=int, metavar="N",
        help=f"number of drawn questions of each kind (default: {PER_KIND}, with --all"
        f" {ALL_PER_KIND})")
    add("--limit", type=int, metavar="N",
        help=f"only the first N questions (default: {QUESTIONS} of a file, with --all all)")
    add("--all", action="store_true",
        help="ask all questions, and try all methods if --pruner names none; can take hours")
    add("--skip-bad", action="store_true", help="skip questions that cannot be read, and list"
        " them")
# fmt: on


def question_set_of(args: argparse.Namespace, grades: bool = True) -> QuestionSet:
    """The question set of the command line; with `grades` its judge is asked, if there is one."""
    if args.questions in DRAWN:
        if Path(args.questions).exists() and args.questions != DRAWN[0]:
            raise UserError(
                f"{args.questions} is the name of drawn questions and of a path here; write"
                f" ./{args.questions} for the path"
            )
        if args.format not in (None, args.questions) or args.images or args.split or args.boxes:
            raise UserError("format, images, split and boxes are for a file's questions")
        if args.questions.startswith("pages") and args.model is None:
            raise UserError("the built-in model knows no word of pages; give a model that does")
        format = with_judge(args, format_of(args.questions))
        read_drawn, per_kind = format.module.read_drawn, per_kind_of(args)
        return QuestionSet(
            args.questions, format, lambda _: read_drawn(per_kind), args.limit, args.skip_bad
        )
    if args.format in DRAWN:
        raise UserError(f"format {args.format} is drawn; write it as questions, without a path")
    if args.per_kind:
        raise UserError("per_kind is for drawn questions; of a file take the first by a limit")
    format = format_of(args.format or "own", Path(args.questions))
    format = with_judge(args, format) if grades else format
    options = {"boxes": args.boxes} if args.boxes else {}
    source = Source(Path(args.questions), args.images, args.split, **options)
    read_source = partial(format.read, source)
    return QuestionSet(args.questions, format, read_source, limit_of(args), args.skip_bad)
