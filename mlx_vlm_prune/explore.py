"""Why did an answer break? A page that shows what methods kept, step by step, and what that cost.

mlx-vlm-prune explore --image photo.jpg --prompt "…" --pruner divprune fastv

The page is one HTML file, with its data inside, that needs no network and no server.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tqdm import tqdm

from .checkpoints.command_line import SCRIPT, in_one_sentence
from .checkpoints.errors import UserError
from .checkpoints.reading.files import check_target
from .checkpoints.user_module import with_files
from .evaluation.budgeted_methods import BudgetedMethod
from .evaluation.explored import Explorer
from .evaluation.sweep_cases import Refusal, budgets_of, full_case, sweep_cases, swept_model
from .generate import SAMPLE_PROMPT, SAMPLE_SEED, generate, load_model
from .generation.arguments import build_explore_parser, typed_prompt
from .generation.exploration import Exploration, ExploredAnswer
from .generation.photographs import has_photograph
from .generation.request import list_images, pixel_limit
from .inputs.image import open_image
from .pruners import AUTO
from .sweep import check_cases, methods_of

DEFAULT_METHODS = ("divprune", "fastv")
DEFAULT_RATIOS = (0.75, 0.5, 0.25)
PROMPT_FLAGS = ("--prompt", "-p")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_explore_parser(DEFAULT_METHODS, DEFAULT_RATIOS)
    with in_one_sentence(parser):
        args = parser.parse_args(argv)
        args.words = list(sys.argv[1:] if argv is None else argv)
        run(args)


def run(args: argparse.Namespace) -> None:
    """Load the model once, answer with every method and budget, and write the page."""
    _check(args)
    images, prompt = _images_and_prompt(args)
    model, processor = load_model(args)
    swept = swept_model(model, processor)
    ratios = args.keep_ratio or ([] if args.keep_tokens else DEFAULT_RATIOS)
    budgets = budgets_of(swept.N, ratios, args.keep_tokens or [])
    methods = methods_of(args, DEFAULT_METHODS)
    cases, refused = sweep_cases(swept, methods, budgets, [args.positions])
    names = ("max_tokens", "chat_template_config", "system", "max_pixels")
    options = {name: getattr(args, name) for name in names}
    ask = partial(generate, model, processor, prompt, image=images)
    explorer = Explorer(model, processor, prompt, images, options, ask, args.predict)
    answers, refusals = explore_all(args, explorer, full_case(swept), cases)
    command = shlex.join([SCRIPT, "explore", *words_with_prompt(args.words, prompt)])
    name, limit = args.model or "scenes", pixel_limit(args.max_pixels, vars(args))
    if has_photograph(processor, (open_image(image, limit) for image in images)):
        name += ", which knows drawn scenes only"
    exploration = Exploration(
        answers, prompt, name, command, [*refused, *refusals],
        timing="one warm run each", prediction=explorer.times.about if explorer.times else "",
    )  # fmt: skip
    exploration.check()
    exploration.save(args.out)
    print(f"Wrote {args.out}: {len(answers)} answers, {args.out.stat().st_size / 1e6:.2f} MB")


def explore_all(
    args: argparse.Namespace, explorer: Explorer, full: BudgetedMethod,
    cases: Sequence[BudgetedMethod],
) -> tuple[list[ExploredAnswer], list[Refusal]]:  # fmt: skip
    """The full answer and all others, and those that were refused. Shows progress."""
    answers: list[ExploredAnswer] = []
    predicted: BudgetedMethod | None = None  # the first whose time was
    refused: list[Refusal] = []
    with tqdm([full, *cases], "answers", file=sys.stderr, leave=False, delay=2) as bar:
        for case in bar:
            bar.set_postfix_str(case.spec, refresh=False)
            try:
                answer = explorer.explore(case, repeat_command(args, case))
            except UserError as problem:
                if case is full:
                    raise
                refused.append({"pruner": case.spec, "tokens": case.K, "why": str(problem)})
                continue
            answers.append(answer)
            predicted = predicted or (case if answer.predicted_ms else None)
    if predicted:
        answers[0] = replace(answers[0], predicted_ms=explorer.predict_full(predicted.pipeline))
    return answers, refused


def repeat_command(args: argparse.Namespace, case: BudgetedMethod) -> str:
    """The call of `generate` that gives one of the answers."""
    words = [SCRIPT, "generate"]
    for name in ("model", "revision", "adapter_path", "system", "max_pixels"):
        if value := getattr(args, name):
            words += flag_with(f"--{name.replace('_', '-')}", str(value))
    if args.image:
        words += ["--image", *args.image, *flag_with("--prompt", args.prompt)]
    if args.allow_url:
        words += ["--allow-url"]
    if args.dtype != "auto":
        words += ["--dtype", args.dtype]
    if args.chat_template_config:
        words += ["--chat-template-config", json.dumps(args.chat_template_config)]
    spec = case.pipeline.spec if case.spec == AUTO else case.spec
    words += ["--pruner", with_files(spec)]
    if case.spec != "none":
        words += ["--keep-tokens" if isinstance(case.K, int) else "--keep-ratio", str(case.K)]
        words += ["--positions", args.positions] if args.positions else []
    return shlex.join([*words, "--max-tokens", str(args.max_tokens), "--json", "answer.json"])


def flag_with(flag: str, value: str) -> list[str]:
    """An option and its value, also one that looks like an option."""
    return [f"{flag}={value}"] if value.startswith("-") else [flag, value]


def words_with_prompt(words: Sequence[str], prompt: str) -> list[str]:
    """The words of a command, with the prompt itself where it came from stdin."""
    written: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if word == "-" and before in PROMPT_FLAGS:
            written[-1:] = flag_with("--prompt", prompt)
        elif word in ("--prompt=-", "-p-"):
            written += flag_with("--prompt", prompt)
        else:
            written.append(word)
    return written


def _images_and_prompt(args: argparse.Namespace) -> tuple[list[Any], str]:
    """The images, and the prompt, from stdin too; the sample scene without any."""
    if args.image:
        if args.prompt == "-":
            args.prompt = typed_prompt()
        return list_images(args.image, args.allow_url), args.prompt
    from .scenes import compose

    return [compose(SAMPLE_SEED).image()], SAMPLE_PROMPT


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before images and weights are read. Raises UserError."""
    check_cases(args)
    if not args.image and (args.model or args.prompt is not None):
        raise UserError("there is no --image; give one")
    if args.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out is {args.out}; it is a page, so name it .html")
    check_target(args.out, replace=True)


if __name__ == "__main__":
    main()
