"""How much each method costs in answers: pruners x budgets x a question set.

mlx-vlm-prune evaluate --model my-model --questions questions.jsonl

For every method: the accuracy by the question set's rule, overall and for each kind; loyalty, how
often the answer equals the one with all tokens; the mean log-probability of the right answer with
its end. Each is compared with full and with `random` at the same budget, with a 95 % interval of
the difference (paired bootstrap over the questions). A batch of questions is put to all methods
before the next, and each method's answers are saved beside the result: an interrupted run is
resumed by the same command. Without options it ends within minutes; `--all` asks all. Under
`mlx.launch` each process answers a batch at a time, and the first writes the result.

`--merge a.json b.json` asks nothing: it gives the mean over such results in percent of full.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from .checkpoints.command_line import SEVERAL, Parser, in_one_sentence
from .checkpoints.errors import UserError
from .checkpoints.hub import resolve_path
from .checkpoints.reading.files import check_target, write_atomically
from .checkpoints.reading.locks import writing_alone
from .evaluation.answers import EvaluatedVLM
from .evaluation.budgeted_methods import BudgetedMethod, budgeted_methods, chooser, default_methods
from .evaluation.dequantize import dequantize_matrices
from .evaluation.drafting import DraftingVLM
from .evaluation.earlier_rows import check_comparable, with_earlier_rows
from .evaluation.evaluation_run import EvaluatedModel, EvaluationRun
from .evaluation.first_look import METHODS, left_out, methods_of
from .evaluation.merging import merge, merged_table
from .evaluation.question_options import add_questions, question_set_of
from .evaluation.question_set import fingerprint
from .evaluation.questions import SENTENCE_TOKENS, Format, Question, have_clips
from .evaluation.result import MOST_RESPONSES, about_run, first_token_rows, is_evidence, result_of
from .evaluation.result_file import check_has_methods, check_not_anothers, default_result_path
from .evaluation.resume import AnsweredBatch, ResumeFile
from .evaluation.scoring_options import add_scoring, check_scoring, written_answers
from .evaluation.table import table
from .generation.request import pixel_limit
from .generation.speculation import check_num_draft_tokens
from .generation.stream import pipeline_for
from .hosts.loading import load
from .inputs.budget import DEFAULT_KEEP_RATIO, check_budget, tokens_for
from .machine.hardware import on_cpu, versions
from .machine.processes import ProcessGroup
from .machine.remembered import remember
from .machine.user_cache import model_key
from .models.adapters import adapter_key
from .models.loading import DTYPES
from .models.vlm import VLM
from .pruners import AUTO
from .pruners.contract import Policy
from .pruners.own_methods import method_spec
from .scenes import CHECKPOINT

RATIOS = (
    DEFAULT_KEEP_RATIO,
    0.25,
    0.1125,
)  # the last is a ninth and a little: 22 of 196, 64 of 576
DESCRIPTION = (
    "Measure what each method costs in accuracy, on a set of questions. Example: --model my-model"
    " --questions questions.jsonl --pruner norm --keep-ratio 0.5; then --merge a.json b.json"
)
SPARE_TOKENS = 4  # of a response


# fmt: off
def build_parser() -> Parser:
    """The command line of `evaluate`, its options in groups."""
    parser = Parser("mlx_vlm_prune.evaluate", description=DESCRIPTION)
    add = parser.add_argument_group("model").add_argument
    add("--model", help="folder or Hugging Face name (default: the built-in scenes model)")
    add("--adapter-path", metavar="FOLDER", help="adapters that were trained for the model"
        " (default: none)")
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="type of the weights and of the computation; auto is float32 on a CPU and the"
        " checkpoint's own type on a GPU")
    add("--widen", action=argparse.BooleanOptionalAction,
        help="compute quantized matrices in float32, with the same values; much faster on a CPU"
        " (default: on a CPU only)")
    add_questions(parser)
    _add_pruning(parser)
    add_scoring(parser)
    _add_run(parser)
    add = parser.add_argument_group("results of one model on several sets").add_argument
    add("--merge", type=Path, **SEVERAL, metavar="FILE.json",
        help="ask no questions: print these results in percent of the full model, for each set and"
        " on average")
    add("--json", type=Path, metavar="FILE", help="write the figures of --merge")
    return parser


def _add_run(parser: Parser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--max-tokens", type=int, metavar="N",
        help="longest answer, in tokens (default: a few more than the longest right answer has,"
        f" and at least {SENTENCE_TOKENS} if it may be part of a sentence)")
    add("--batch", type=int, metavar="N",
        help="questions per batch (default: 24; 1 with models of mlx-vlm and with drafts)")
    add("--seed", type=int, default=0, metavar="N",
        help="seed of the bootstrap; the seed of the method random is --pruner random:seed=1")
    add("--num-draft-tokens", type=int, metavar="N",
        help="number of tokens that the model's twig drafts, 5 in TwigVLM; the answers are the"
        " same; questions are asked one by one (default: none)")
    add("--first-token", type=int, metavar="N",
        help="ask the first N questions again, one by one, to measure the time to the first token"
        " with picture, tower and pruner (default: none)")
    add("--compare-with", type=Path, metavar="FILE.json",
        help="an earlier result of the same model and questions: its rows that this run does not"
        " ask stand in the table and the result, too (default: none)")
    add("--texts", action=argparse.BooleanOptionalAction,
        help="store questions, right answers and responses in the result (default: up to"
        f" {MOST_RESPONSES} responses)")
    add("--out", type=Path, metavar="FILE.json",
        help="result file; an interrupted run is kept beside it; a result of another model, or of"
        " other or more questions, is not replaced (default: evaluation-MODEL-QUESTIONS.json,"
        " which is not replaced by other methods either)")


def _add_pruning(parser: Parser) -> None:
    add = parser.add_argument_group("pruning").add_argument
    add("--pruner", **SEVERAL, type=method_spec, metavar="SPEC",
        help="methods or chains, as in `generate` (default:"
        f" {', '.join(METHODS)} and the learned ones; with --all all, and some chains; the"
        " checkpoint's own method, if it was trained with one)")
    add("--keep-tokens", type=int, **SEVERAL, metavar="K",
        help="numbers of visual tokens to keep (default: none)")
    add("--keep-ratio", type=float, **SEVERAL, metavar="R",
        help="shares of the visual tokens to keep (default: 0.5, 0.25 and 0.1125)")
    add("--positions", **SEVERAL, choices=("keep", "renumber"),
        help="kept tokens keep their positions or are renumbered; give both to measure both"
        " (default: as in the method's paper)")
# fmt: on


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        args, processes = parser.parse_args(argv), ProcessGroup()
        with processes.mistakes_once():
            run(args, processes)


def run(args: argparse.Namespace, processes: ProcessGroup) -> None:
    """Merge results, or evaluate where no other process writes to the same file."""
    args.is_own_name = args.out is not None
    args.out = args.out or default_result_path(args.model, args.questions)
    _check(args)
    if args.merge:
        if processes.is_first:
            print_merged(args.merge, args.json)
        return
    with ExitStack() as held:
        with processes.together():
            if processes.is_first:
                held.enter_context(writing_alone(args.out, "evaluating", "--out"))
        evaluate(args, processes)


def evaluate(args: argparse.Namespace, processes: ProcessGroup) -> None:
    """Answer all questions, score, print and write."""
    question_set = question_set_of(args, grades=processes.is_first)
    questions, unread = question_set.load()
    folder = resolve_path(args.model) if args.model else CHECKPOINT
    about = about_run(args, folder, question_set)
    with processes.together():
        if processes.is_first:
            check_not_anothers(args.out, about, len(questions))
    model, processor = load_widened(args, folder)
    evaluated, methods, refused = evaluated_model(args, model, processor, have_clips(questions))
    with processes.together():
        if processes.is_first and not args.is_own_name:
            check_has_methods(args.out, methods)
    if args.max_tokens is None:
        args.max_tokens = most_answer_tokens(evaluated, question_set.format, questions)
    check_comparable(args, about, len(questions))
    args.batch = args.batch or evaluated.questions_at_once
    evaluation = EvaluationRun(
        evaluated, question_set, questions, methods, args.max_tokens, args.batch, processes
    )
    settings = resume_settings(args, evaluation, folder)
    resume_file = ResumeFile(args.out, settings, AnsweredBatch)
    first_tokens = put_questions(args, evaluation, resume_file, model, processor)
    if not processes.is_first:
        return
    result = result_of(args, about, evaluation, unread, refused, folder, first_tokens)
    is_trained_with_one = isinstance(model, VLM) and bool(model.config.pruner)
    if part := left_out(args, question_set, len(questions), is_trained_with_one):
        result["part"] = part
    result = with_earlier_rows(result | written_answers(args, evaluation), args.compare_with)
    write_atomically(args.out, json.dumps(result, indent=4, ensure_ascii=False) + "\n")
    if is_evidence(args, evaluation):
        remember(folder, result)
    resume_file.remove()
    print(table(result))
    if "answers" in result:
        print(f"Wrote the answers into {result['answers']}")
    print(f"Wrote {args.out}")


def load_widened(args: argparse.Namespace, folder: Path) -> tuple[Any, Any]:
    """The model under evaluation and its processor, quantized matrices widened where they are to
    be."""
    model, processor = load(folder, dtype=args.dtype, adapter_path=args.adapter_path)
    if args.widen is None:
        args.widen = on_cpu()
    if args.widen:
        dequantize_matrices(model)
    return model, processor


def put_questions(
    args: argparse.Namespace, evaluation: EvaluationRun, resume_file: ResumeFile[AnsweredBatch],
    model: Any, processor: Any,
) -> list[dict[str, float]]:  # fmt: skip
    """Answer all questions; the times to the first token, if they are wanted. Ctrl-C ends with
    code 130, and what is answered stays."""
    try:
        evaluation.run(resume_file)
        if not (args.first_token and evaluation.processes.is_first):
            return []
        return first_token_rows(evaluation, model, processor, args)
    except KeyboardInterrupt:
        line = f"interrupted after {evaluation.progress}; the same command goes on from there"
        print(f"\n{line}", file=sys.stderr)
        sys.exit(130)


def evaluated_model(
    args: argparse.Namespace, model: Any, processor: Any, with_clips: bool = False
) -> tuple[EvaluatedModel, list[BudgetedMethod], list[dict]]:
    """The model under evaluation, the methods with their budgets, and those refused; `with_clips`
    where it is asked about clips."""
    limit = pixel_limit(args.max_pixels, None)
    check_num_draft_tokens(args.num_draft_tokens, 0, isinstance(model, VLM))
    if isinstance(model, VLM):
        specs = methods_of(args, default_methods(model), model.learned)
        budgets = budgets_of(args, model.N)
        if model.config.pruner and not args.pruner:
            (step,) = pipeline_for(model, None).steps
            specs = [step.spec]
            if not (args.keep_ratio or args.keep_tokens):
                budgets = [step.trained_tokens or model.N]
        methods, refused = budgeted_methods(
            model.N, specs, budgets, model.learned, policies_of(args), chooser(model, processor)
        )
        pipelines = [method.pipeline for method in methods]
        if args.num_draft_tokens:
            drafting = DraftingVLM(model, processor, pipelines, args.num_draft_tokens, limit)
            return drafting, methods, refused
        return EvaluatedVLM(model, processor, pipelines, limit), methods, refused
    # A model of mlx-vlm's, whose images differ in N.
    from .evaluation import host_answers
    from .hosts.clips import why_not_clip
    from .hosts.families import host_of

    host = host_of(model, processor)
    supported = host_answers.default_methods(host, with_clips=with_clips)
    specs = methods_of(args, supported, host.learned, with_clips=with_clips)
    why_not = {"why_not": partial(why_not_clip, host)} if with_clips else {}
    methods, refused = budgeted_methods(
        None, specs, budgets_of(args, None), host.learned, policies_of(args),
        chooser(model, processor, with_clips=with_clips), **why_not,
    )  # fmt: skip
    pipelines = [method.pipeline for method in methods]
    return host_answers.EvaluatedHost(host, pipelines, limit), methods, refused


def policies_of(args: argparse.Namespace) -> list[Policy | None]:
    """Each policy of positions to measure; None is that of the method's paper."""
    return [*dict.fromkeys(args.positions or (None,))]


def resume_settings(args: argparse.Namespace, evaluation: EvaluationRun, folder: Path) -> list[Any]:
    """All that decides the answers and their scores.

    --skip-bad is left out, so that a run that met a bad question can be resumed with it.
    """
    options = [args.seed, args.max_tokens, args.batch, args.dtype, args.widen]
    options += [args.num_draft_tokens] if args.num_draft_tokens else []
    options += [f"{args.max_pixels} pixels"] if args.max_pixels else []
    methods = [
        (m.pipeline.spec if m.spec == AUTO else m.spec, m.K, m.pipeline.policy)
        for m in evaluation.methods
    ]
    questions = (evaluation.question_set.format.name, fingerprint(evaluation.questions))
    adapter = adapter_key(args.adapter_path) if args.adapter_path else None
    return [model_key(folder), adapter, questions, methods, options, versions()]


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for options that would fail only later."""
    for name in ("per_kind", "limit", "max_tokens", "batch", "first_token"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    for ratio in args.keep_ratio or ():
        check_budget(ratio, None)
    for K in args.keep_tokens or ():
        check_budget(None, K)
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; it must be at least 0")
    check_scoring(args)
    pixel_limit(args.max_pixels, None)
    if args.json and not args.merge:
        raise UserError("--json is for --merge; a run writes its result to --out")
    check_target(args.json or args.out, replace=True)


def budgets_of(args: argparse.Namespace, N: int | None) -> list[float]:
    """The budgets as tokens of N, the largest first; where images differ in N, shares stay."""
    ratios = args.keep_ratio or (() if args.keep_tokens else RATIOS)
    budgets: set[float] = {min(K, N or K) for K in args.keep_tokens or ()}
    budgets |= {tokens_for(N, ratio) if N else float(ratio) for ratio in ratios}
    return sorted(budgets, reverse=True)


def most_answer_tokens(model: EvaluatedModel, format: Format, questions: Sequence[Question]) -> int:
    """A limit that any right answer fits into, with its end and some spare tokens.

    Where a response may hold the answer in a sentence, at least a sentence fits.
    """
    lengths = (len(model.encode(text)) for q in questions for text in q.answers)
    return max(max(lengths, default=0) + 1 + SPARE_TOKENS, format.least_tokens)


def print_merged(paths: Sequence[Path], json_path: Path | None) -> None:
    """Print results of one model on several sets, and write the figures. Raises UserError."""
    merged = merge(paths)
    print(merged_table(merged))
    if json_path:
        write_atomically(json_path, json.dumps(merged, indent=4, ensure_ascii=False) + "\n")
        print(f"Wrote {json_path}")


if __name__ == "__main__":
    main()
