"""What an evaluation asks if nothing is said: so much that it ends within minutes.

`--all` asks all questions and all methods. Any other option decides alone what it is about.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from .question_set import QuestionSet
from .questions import DRAWN

QUESTIONS = 60  # the first of a file
PER_KIND, ALL_PER_KIND = 20, 334  # of the built-in ones
# A baseline beside random, then choices by attention, diversity and coverage, one with `restore`; a
# merge after the tower and one inside it; one in the language model.
METHODS = (
    "uniform", "received_attention", "divprune", "divprune+restore", "scope", "visionzip", "tome",
    "fastv",
)  # fmt: skip

FOR_CLIPS = ("vidcom2", "evs", "flashvid")


def methods_of(
    args: argparse.Namespace, supported: Sequence[str], learned: Any, *, with_clips: bool = False
) -> list[str]:
    """The methods to ask: those of the command line, all supported, or a few with the learned and,
    of clips, those for clips."""
    if args.pruner:
        return list(args.pruner)
    few = (*METHODS, *(FOR_CLIPS if with_clips else ()), *learned)
    return [spec for spec in supported if args.all or spec in few]


def per_kind_of(args: argparse.Namespace) -> int:
    """How many built-in questions of each kind are asked."""
    return args.per_kind or (ALL_PER_KIND if args.all or args.limit else PER_KIND)


def limit_of(args: argparse.Namespace) -> int | None:
    """How many questions of a file are asked; None for all."""
    return args.limit or (None if args.all else QUESTIONS)


def left_out(
    args: argparse.Namespace, question_set: QuestionSet, count: int, has_one_method: bool = False
) -> list[str]:
    """What --all would ask more of: "questions", "methods" or both.

    `count` questions are asked. A model `has_one_method` where it was trained with that one.
    """
    if args.all:
        return []
    is_drawn = args.questions in DRAWN
    is_chosen = args.limit or (is_drawn and args.per_kind)
    is_part = not is_chosen and (is_drawn or question_set.has_more(count))
    return ["questions"] * is_part + ["methods"] * (not args.pruner and not has_one_method)
