"""Options of `evaluate` that say how responses are scored, and where the answers are written."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoints.command_line import Parser
from ..checkpoints.errors import UserError
from .answer_files import check_answer_folder, write_answers
from .evaluation_run import EvaluationRun
from .language_judge import LanguageJudge
from .questions import Format, Source


# fmt: off
def add_scoring(parser: Parser) -> None:
    """The group of these options."""
    add = parser.add_argument_group("scoring").add_argument
    add("--answers", type=Path, metavar="FOLDER",
        help="also write every method's answers there, in LLaVA's layout and for the benchmark's"
        " own evaluation (default: only if they cannot be scored here, beside --out)")
    add("--judge-url", metavar="URL",
        help="an OpenAI-compatible server that grades MM-Vet's answers, such as"
        " http://127.0.0.1:8000/v1 (default: none, so they are only written)")
    add("--judge-model", metavar="NAME", help="the server's model that grades (default: none)")
# fmt: on


def check_scoring(args: argparse.Namespace) -> None:
    """Raises UserError for options that would fail only later."""
    if bool(args.judge_url) != bool(args.judge_model):
        raise UserError("judge_url and judge_model go together")
    if args.answers:
        check_answer_folder(args.answers)


def with_judge(args: argparse.Namespace, format: Format) -> Format:
    """The format with the judge of the command line, if there is one. UserError if not needed."""
    if not args.judge_url:
        return format
    if not format.needs_grader:
        raise UserError(f"judge_url is for mmvet; {format.name} has a rule of its own")
    kept = args.out.with_name(f"{args.out.stem}.grades.jsonl")
    judge = LanguageJudge(format.module, args.judge_url, args.judge_model, kept)
    return replace(format, grader=judge)


def written_answers(args: argparse.Namespace, evaluation: EvaluationRun) -> dict[str, Any]:
    """Write the answers where they are wanted; what the result says of them and of the judge."""
    format, folder = evaluation.question_set.format, args.answers
    judged = {"judge": args.judge_model} if format.grader else {}
    if not folder:
        if evaluation.is_scored:
            return judged
        folder = args.out.with_name(f"{args.out.stem}-answers")
        check_answer_folder(folder)
    answers, _ = evaluation.collect()
    model = Path(args.model).name if args.model else "scenes"
    source = Source(Path(args.questions), args.images, args.split)
    write_answers(folder, format, source, model, evaluation.working_methods, answers)
    return {**judged, "answers": str(folder)}
