"""The main job: answer a prompt about images with fewer visual tokens.

python -m mlx_vlm_prune.generate --image photo.jpg --prompt "…" --pruner avgpool --keep-ratio 0.25

Without arguments: a sample question about a sample scene, full beside pruned.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from .checkpoints.errors import Parser, UserError, in_one_sentence
from .checkpoints.files import appearing, check_target, parse_json, write_atomically
from .generation.request import check_decoding
from .generation.result import GenerationResult
from .generation.speculation import check_drafts
from .generation.stream import generate, stream_generate
from .loading import DTYPES, load
from .machine import versions
from .model import VLM
from .planning.budgets import Budget, BudgetChoice, keep_within
from .printing import LINE, as_json, print_comparison, print_figures
from .pruners.budget import check_budget

__all__ = ["GenerationResult", "generate", "main", "stream_generate", "versions"]

SAMPLE_SEED = 1_000_000_007  # held out: the built-in model never saw this scene
SAMPLE_PROMPT = "What does the sign say?"
SAMPLE_PRUNER = "cls_attention"
SAMPLE_OVERLAY = Path("kept.png")
SCENES_ONLY = (
    "note: the built-in model knows its own drawn scenes only, not photographs; for those convert"
    " a trained checkpoint (python -m mlx_vlm_prune convert to-mlx --help) and give it as --model"
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(
        prog="python -m mlx_vlm_prune.generate",
        description="Answer a prompt about images with fewer visual tokens. Without arguments: "
        "a sample question, answered with all visual tokens and with half of them.",
    )
    add = p.add_argument
    add("--model", help="folder or hub name (default: the built-in scenes model)")
    add("--image", action="append", default=[], help="an image file; repeat for several")
    add("--prompt", "-p", help="the question ('-' reads stdin); <image> marks an image's place")
    add("--pruner", help="NAME, NAME:option=value,… or a chain NAME+NAME")
    add("--keep-ratio", type=float, help="share of the visual tokens to keep, above 0 to 1")
    add("--keep-tokens", type=int, help="how many visual tokens of each image to keep")
    add("--budget-ms", type=float, metavar="MS", help="instead: as many as the first token can "
        "come with in this time, by a calibration of this machine")  # fmt: skip
    add("--budget-gb", type=float, metavar="GB", help="instead: as many as fit into this memory")
    add("--positions", help="keep or renumber kept tokens' positions (default: as its paper)")
    add("--max-tokens", "-m", type=int, default=256, help="most tokens to answer with")
    add("--temp", "--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--chat-template-config", type=_object, metavar="JSON", help='as {"open_thinking": true}')
    add("--prefill-step-size", type=int, metavar="ROWS", help="mlx-vlm models: rows read at once")
    add("--kv-bits", type=float, help="mlx-vlm models: bits of a number in the cache")
    add("--quantized-kv-start", type=int, metavar="ROWS",
        help="mlx-vlm models: once the cache has more rows than these (default 5000)")  # fmt: skip
    add("--resize-shape", type=int, nargs="+", metavar="PIXELS",
        help="mlx-vlm models: one or two sides that pictures are to fit in")  # fmt: skip
    add("--num-draft-tokens", type=int, metavar="N", help="models with a twig: tokens that it may"
        " guess ahead (TwigVLM's 5); the greedy answer stays the same")  # fmt: skip
    add("--revision", help="of a hub name: a branch, tag or commit")
    add("--dtype", default="auto", help=f"auto, {', '.join(DTYPES)}")
    add("--json", type=Path, metavar="FILE", help="write the answer and all figures")
    add("--overlay", type=Path, metavar="FILE.png", help="draw what was kept")
    add("--compare", action="store_true", help="full and pruned, side by side")
    add("--verbose", action=argparse.BooleanOptionalAction, default=True, help="print figures")
    args = p.parse_args(argv)
    args.is_sample = not args.image and args.prompt is None and args.model is None
    return args


def _object(text: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    with in_one_sentence():
        run(parse(argv))


def run(args: argparse.Namespace) -> None:
    """Load, answer once or twice, and write what was asked for."""
    _check_outputs(args)
    if args.is_sample:
        _use_sample(args)
    elif args.prompt is None:
        raise UserError("there is no --prompt; give one, or '-' to read it from stdin")
    prompt = sys.stdin.read().strip() if args.prompt == "-" else args.prompt
    pruner, limits = args.pruner or ("none" if not _has_budget(args) else None), _limits(args)
    if pruner is None:
        raise UserError("a budget needs a --pruner, for example --pruner avgpool")
    if args.compare and pruner == "none":
        raise UserError("--compare sets a pruner beside none; give a --pruner")
    model, processor = load(args.model, dtype=args.dtype, revision=args.revision)
    if getattr(processor, "is_scenes", False) and any(not _is_scene(image) for image in args.image):
        print(SCENES_ONLY, file=sys.stderr)
    options: dict[str, Any] = dict(
        image=args.image, positions=args.positions, max_tokens=args.max_tokens,
        temperature=args.temp, top_p=args.top_p, seed=args.seed, template=args.chat_template_config,
        prefill_step_size=args.prefill_step_size, kv_bits=args.kv_bits,
        quantized_kv_start=args.quantized_kv_start, resize_shape=args.resize_shape,
        num_draft_tokens=args.num_draft_tokens,
    )  # fmt: skip
    budget = dict(pruner=pruner, keep_ratio=args.keep_ratio, keep_tokens=args.keep_tokens)
    choice = _choose(args, model, processor, prompt, pruner, limits) if limits else None
    if choice:
        budget = choice.options
    compare = args.compare and budget["pruner"] != "none"
    for chosen in (*([{}] if compare else []), *([budget] if compare or choice else [])):
        generate(model, processor, prompt, **{**options, **chosen, "max_tokens": 1})  # warm
    full = None
    if compare:
        full = _answer(args, model, processor, prompt, options, "All visual tokens")
    answer = _answer(args, model, processor, prompt, options | budget, "Pruned" if full else "")
    if choice and args.verbose:
        print(choice.outcome(answer))
    if full and args.verbose:
        print_comparison(full, answer)
    _write_files(args, answer, full, choice)


def _write_files(
    args: argparse.Namespace,
    answer: GenerationResult,
    full: GenerationResult | None,
    choice: BudgetChoice | None,
) -> None:
    if args.overlay:
        with appearing(args.overlay, replace=True) as beside:
            answer.overlay().save(beside, format="PNG")
        if args.verbose:
            print(f"Overlay: {args.overlay}")
    if args.json:
        figures = as_json(answer) | ({"full": as_json(full)} if full else {})
        figures |= {"budget": choice.as_json(answer)} if choice else {}
        write_atomically(args.json, json.dumps(figures, indent=4, ensure_ascii=False) + "\n")


def _answer(
    args: argparse.Namespace, model: Any, processor: Any, prompt: str, options: dict, title: str
) -> GenerationResult:
    """Stream one answer to stdout, with mlx-lm's lines around it."""
    pieces: list[str] = []
    for piece in stream_generate(model, processor, prompt, **options):
        if args.verbose and not pieces:
            print(LINE, title) if title else print(LINE)
        print(piece.text, end="", flush=True)
        pieces.append(piece.text)
    print()
    answer = replace(piece, text="".join(pieces))
    if args.verbose:
        print(LINE)
        print_figures(answer)
    return answer


def _has_budget(args: argparse.Namespace) -> bool:
    told = (args.keep_ratio, args.keep_tokens, args.budget_ms, args.budget_gb)
    return any(one is not None for one in told)


def _limits(args: argparse.Namespace) -> Budget | None:
    if args.budget_ms is None and args.budget_gb is None:
        return None
    if args.keep_ratio is not None or args.keep_tokens is not None:
        raise UserError(
            "--budget-ms and --budget-gb choose how many tokens to keep; leave out --keep-ratio"
            " and --keep-tokens"
        )
    if args.num_draft_tokens is not None:
        raise UserError(
            "--budget-ms and --budget-gb do not count what a twig takes; leave out"
            " --num-draft-tokens"
        )
    return Budget(args.budget_ms, args.budget_gb)


def _choose(
    args: argparse.Namespace, model: Any, processor: Any, prompt: str, pruner: str, limits: Budget
) -> BudgetChoice:
    """K for a budget, and the prediction, said before the answer is begun."""
    if not isinstance(model, VLM):
        raise UserError(
            "--budget-ms and --budget-gb do not know mlx-vlm's models yet; give --keep-tokens"
        )
    choice = keep_within(
        model, processor, prompt, args.image, pruner=pruner, ms=limits.ms, gb=limits.gb,
        max_tokens=args.max_tokens, template=args.chat_template_config,
    )  # fmt: skip
    if choice.reason:
        print(f"note: {choice.reason}", file=sys.stderr)
    elif args.verbose:
        print(choice)
    return choice


def _is_scene(image: Any) -> bool:
    """Does it look like a drawn scene? Those are 224 x 224; a broken file is reported elsewhere."""
    from .image import open_image
    from .scenes import SIZE

    return open_image(image).size == (SIZE, SIZE)


def _use_sample(args: argparse.Namespace) -> None:
    from .scenes import compose

    args.image, args.prompt = [compose(SAMPLE_SEED).image()], SAMPLE_PROMPT
    args.pruner = args.pruner or SAMPLE_PRUNER
    args.compare, args.overlay = args.pruner != "none", args.overlay or SAMPLE_OVERLAY
    print(f"Sample scene {SAMPLE_SEED}: {args.prompt}")


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse before any work what could not be written, or makes no sense, after it."""
    check_budget(args.keep_ratio, args.keep_tokens)
    check_decoding(args.max_tokens, args.temp, args.top_p, args.seed)
    check_drafts(args.num_draft_tokens, args.temp, True)
    for path in (args.json, args.overlay):
        if path:
            check_target(path, replace=True)
    if args.overlay and not args.image and not args.is_sample:
        raise UserError("--overlay needs an --image")
    if args.overlay and args.overlay.suffix.lower() != ".png":
        raise UserError(f"--overlay is {args.overlay}; it is drawn as PNG, so name it .png")


class _Callable(ModuleType):
    """`mlx_vlm_prune.generate` is this module and, called, its function.

    Python binds a submodule's name in its package on import; so the order of imports
    does not decide which of the two a user gets.
    """

    def __call__(self, *args: Any, **options: Any) -> GenerationResult:
        return generate(*args, **options)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    main()
