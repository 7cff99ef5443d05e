"""How much each method costs in answers: pruners x budgets x a question set.

python -m mlx_vlm_prune.evaluate --model my-model --questions questions.jsonl

For every method: the accuracy by the question set's own rule, overall and per kind; loyalty,
how often the answer is the very one that the model gives with all tokens; the mean
log-probability of the right answer with its end. Each stands beside full and beside
`random` with as many tokens, with a 95 % interval of the difference (paired bootstrap over the
questions). Every question is asked of all methods before the next, and what was reached is
kept beside the result: an interrupted run goes on where it was.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from .checkpoints.command_line import Parser, in_one_sentence
from .checkpoints.errors import UserError
from .checkpoints.hub import found
from .checkpoints.reading.files import check_target, write_atomically
from .evaluation.answers import OwnRespondent
from .evaluation.asking import Asked, Asking, Entry, QuestionSet, entries, fingerprint
from .evaluation.judge import Judge
from .evaluation.kept import Kept
from .evaluation.questions import FORMATS, Question, Source, format_of
from .evaluation.table import table
from .evaluation.widen import widen
from .hosts.loading import load
from .machine.hardware import machine, versions
from .machine.user_cache import cache_folder, keep, model_key
from .models.loading import DTYPES
from .models.vlm import VLM
from .pruners import METHODS, Stage
from .pruners.budget import check_budget, tokens_for
from .scenes import CHECKPOINT

CHAINS = ("cls_attention+restore", "cls_attention+fastv", "visionzip+pyramiddrop", "tome+divprune")
RATIOS = (0.5, 0.25, 0.1125)  # the last is a ninth and a little: 22 of 196, 64 of 576
PER_KIND = 334
DESCRIPTION = "Measure what each method costs in accuracy, on a set of questions."
EXACT = ("scenes", "own")  # formats whose answers are right or wrong as a whole
SPARE, SENTENCE = 4, 32  # tokens


# fmt: off
def build_parser() -> Parser:
    """The command line of `evaluate`, its options in groups."""
    parser = Parser("mlx_vlm_prune.evaluate", description=DESCRIPTION)
    add = parser.add_argument_group("model").add_argument
    add("--model", help="folder or Hugging Face name (default: the built-in scenes model)")
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="of the weights and the computation; auto is float32 on a CPU, the checkpoint's own"
        " on a GPU")
    add("--widen", action=argparse.BooleanOptionalAction,
        help="compute quantized matrices in float32, with the same values; much faster on a CPU"
        " (default: on a CPU only)")
    _add_questions(parser)
    _add_pruning(parser)
    add = parser.add_argument_group("run").add_argument
    add("--max-tokens", type=int, metavar="N",
        help="longest answer, in tokens (default: a few more than the longest right answer has,"
        f" and at least {SENTENCE} where it may be part of a sentence)")
    add("--batch", type=int, default=24, metavar="N", help="questions answered at once")
    add("--seed", type=int, default=0, metavar="N",
        help="of the bootstrap; that of random is --pruner random:seed=1")
    add("--out", type=Path, default=Path("evaluation.json"), metavar="FILE.json",
        help="where the result goes; an interrupted run is kept beside it")
    return parser


def _add_questions(parser: Parser) -> None:
    add = parser.add_argument_group("questions").add_argument
    add("--questions", default="scenes", metavar="PATH",
        help="a file or folder, or scenes, the built-in ones")
    add("--format", metavar="NAME",
        help=f"format of that file: {', '.join(FORMATS)} (default: own)")
    add("--images", type=Path, metavar="FOLDER",
        help="folder of the images (default: beside the questions)")
    add("--split", metavar="NAME",
        help="a part of RefCOCO's questions (default: all but train) or ScienceQA's (test)")
    add("--boxes", choices=("unit", "thousand", "pixels"),
        help="coordinates in RefCOCO's questions and answers: 0 to 1, 0 to 1000, or pixels"
        " (default: unit)")
    add("--per-kind", type=int, metavar="N",
        help=f"number of scenes questions of each kind (default: {PER_KIND})")
    add("--limit", type=int, metavar="N", help="only the first N questions (default: all)")
    add("--skip-bad", action="store_true", help="leave out questions that cannot be read, and list"
        " them")


def _add_pruning(parser: Parser) -> None:
    add = parser.add_argument_group("pruning").add_argument
    add("--pruner", action="append", metavar="SPEC",
        help="a method or a chain, as in `generate`; repeat for several (default: all, and some"
        " chains)")
    add("--keep-tokens", type=int, action="append", metavar="K",
        help="number of visual tokens to keep; repeat for several (default: none)")
    add("--keep-ratio", type=float, action="append", metavar="R",
        help="share of the visual tokens to keep; repeat for several (default: 0.5, 0.25 and"
        " 0.1125)")
# fmt: on


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Ask, judge, print and write."""
    _check(args)
    questions = chosen(args)
    listed, unread = questions.listed()
    folder = found(args.model) if args.model else CHECKPOINT
    model, processor = load(folder, dtype=args.dtype)
    if args.widen is None:
        args.widen = mx.default_device().type == mx.DeviceType.cpu
    if args.widen:
        widen(model)
    contest, refused, asked = begun(args, model, processor)
    args.max_tokens = args.max_tokens or longest(asked, questions.format.name, listed)
    asking = Asking(asked, questions, listed, contest, args.max_tokens, args.batch)
    kept = Kept(args.out, decisive(args, asking, folder))
    try:
        asking.run(kept)
    except KeyboardInterrupt:
        reached = f"{asking.upto} of {len(listed)} questions are answered"
        print(f"\ninterrupted: {reached}; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    told = result(args, asking, unread, refused, folder)
    text = json.dumps(told, indent=4, ensure_ascii=False) + "\n"
    write_atomically(args.out, text)
    remember(folder, text)
    kept.remove()
    print(table(told))
    print(f"Wrote {args.out}")


def begun(
    args: argparse.Namespace, model: Any, processor: Any
) -> tuple[list[Entry], list[dict], Asked]:
    """The methods with their budgets, those that cannot be, and the model to be asked."""
    if isinstance(model, VLM):
        specs = args.pruner or usual(model)
        contest, refused = entries(model.N, specs, budgets(args, model.N), model.learned)
        pipelines = [entry.pipeline for entry in contest]
        return contest, refused, OwnRespondent(model, processor, pipelines)
    # a model of mlx-vlm's, whose images differ in N
    from .evaluation import host_answers
    from .hosts.families import host_of

    host = host_of(model, processor)
    specs = args.pruner or host_answers.usual(host)
    contest, refused = entries(None, specs, budgets(args, None), {})
    pipelines = [entry.pipeline for entry in contest]
    return contest, refused, host_answers.HostRespondent(host, pipelines)


def decisive(args: argparse.Namespace, asking: Asking, folder: Path) -> list[Any]:
    """All that decides what is answered, and how it is judged; not whether bad ones are skipped,
    so that one can go on with --skip-bad where one was met."""
    options = (args.seed, args.max_tokens, args.batch, args.dtype, args.widen)
    pairs = [(entry.spec, entry.K) for entry in asking.contest]
    asked = (asking.questions.format.name, fingerprint(asking.listed))
    return [model_key(folder), asked, pairs, options, versions()]


def result(
    args: argparse.Namespace, asking: Asking, unread: list[str], refused: list[dict], folder: Path
) -> dict[str, Any]:
    """All that --out holds."""
    sheet, skipped = asking.sheet()
    format = asking.questions.format
    judge = Judge(format, sheet.questions, args.seed)
    places = {(entry.spec, entry.K): p for p, entry in enumerate(asking.able)}
    compared = [one.spec not in ("none", "random") for one in asking.able]
    random = [places.get(("random", one.K)) if other else None
              for one, other in zip(asking.able, compared, strict=True)]  # fmt: skip
    sizes = asking.sizes
    of = round(sum(sizes) / len(sizes))
    named: list[dict[str, Any]] = [
        {"pruner": a.spec, "tokens": a.tokens(sizes), "of": of} for a in asking.able
    ]
    for row, one in zip(named, asking.able, strict=True):
        if not isinstance(one.K, int):
            row["keep_ratio"] = one.K
        elif row["tokens"] != one.K:
            row["keep_tokens"] = one.K  # some images have fewer
    rows = [a | b for a, b in zip(named, judge.rows(sheet, 0, random), strict=True)]
    return {
        "questions": asking.questions.name,
        "format": format.name,
        "model": args.model or "scenes",
        "count": len(sheet.questions),
        "kinds": {kind: sum(q.kind == kind for q in sheet.questions) for kind in judge.kinds},
        "unit": format.unit,
        "seed": args.seed,
        "max_tokens": args.max_tokens,
        "majority": judge.majority(),
        "machine": machine(),
        "versions": versions(),
        "seconds": round(sum(batch.seconds for batch in asking.done), 1),
        "megabytes": megabytes(folder),
        "rows": rows,
        "refused": refused + asking.refusals(),
        "skipped": unread + skipped,
    }


def _check(args: argparse.Namespace) -> None:
    """Refuse at once what could not be asked, or written at the end."""
    for name in ("per_kind", "limit", "max_tokens", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    for ratio in args.keep_ratio or ():
        check_budget(ratio, None)
    for K in args.keep_tokens or ():
        check_budget(None, K)
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; it must be at least 0")
    check_target(args.out, replace=True)


def chosen(args: argparse.Namespace) -> QuestionSet:
    """The question set that the command line names."""
    if args.questions == "scenes":
        if args.format not in (None, "scenes") or args.images or args.split or args.boxes:
            raise UserError("--format, --images, --split and --boxes are for a file's questions")
        format = format_of("scenes")
        read = format.module.read_scenes
        number = args.per_kind or PER_KIND
        return QuestionSet("scenes", format, lambda _: read(number), args.limit, args.skip_bad)
    if args.per_kind:
        raise UserError("--per-kind is for scenes; of a file take the first with --limit")
    format = format_of(args.format or "own")
    options = {"boxes": args.boxes} if args.boxes else {}
    source = Source(Path(args.questions), args.images, args.split, **options)
    read = partial(format.read, source)
    return QuestionSet(args.questions, format, read, args.limit, args.skip_bad)


def usual(model: VLM) -> list[str]:
    """All methods that the model can do, each as its paper has it, and some chains."""
    able = [
        name
        for name, method in METHODS.items()
        if method.stage is not Stage.ENHANCER and (not method.learned or name in model.learned)
    ]
    dynamic = ["mlp:dynamic"] if "mlp" in model.learned else []
    return [*able, *dynamic, *CHAINS]


def budgets(args: argparse.Namespace, N: int | None) -> list[float]:
    """How many of N tokens, the most first; where images differ in N, shares as they are."""
    ratios = args.keep_ratio or (() if args.keep_tokens else RATIOS)
    for K in args.keep_tokens or ():
        if N and K > N:
            raise UserError(f"--keep-tokens is {K}; an image has 1 to {N} visual tokens")
    told: set[float] = {*(args.keep_tokens or ())}
    told |= {tokens_for(N, ratio) if N else float(ratio) for ratio in ratios}
    return sorted(told, reverse=True)


def longest(model: Asked, format: str, questions: Sequence[Question]) -> int:
    """Tokens that any right answer fits into, with its end and a little more; where the answer
    is looked for in what was said, a sentence at least."""
    most = max(len(model.encode(text)) for q in questions for text in q.answers)
    return max(most + 1 + SPARE, 0 if format in EXACT else SENTENCE)


def megabytes(folder: Path) -> float:
    """The size of a model's weights."""
    files = [*folder.glob("model*.safetensors")] or [
        file for kind in ("*.safetensors", "*.bin", "*.pth") for file in folder.glob(kind)
    ]
    return round(sum(file.stat().st_size for file in files) / 1e6, 2)


def remember(folder: Path, text: str) -> None:
    """Keep a copy as the last evaluation of this model, for `advise`."""
    with suppress(UserError):  # it can be made again, and the result is written
        keep(cache_folder() / "evaluations" / f"{model_key(folder)}.json", text)


if __name__ == "__main__":
    main()
