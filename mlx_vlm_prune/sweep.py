"""Methods x budgets on your own images: times, operations, memory and answers beside full.

mlx-vlm-prune sweep --model my-model --image photo.jpg --prompt "…" --pruner norm divprune

Full and pruned answers take turns in one process, so that a machine that slows down does so for
both. Every round is saved beside the result: an interrupted sweep is resumed by the same command.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .checkpoints.command_line import in_one_sentence
from .checkpoints.errors import UserError
from .checkpoints.reading.files import check_target, write_atomically
from .checkpoints.reading.locks import writing_alone
from .evaluation.resume import ResumeFile
from .evaluation.sweep_cases import budgets_of, full_case, sweep_cases, swept_model
from .evaluation.sweep_images import readable_images
from .evaluation.sweep_result import refusals, sweep_rows
from .evaluation.sweep_run import Round, Rounds, SweepRun
from .evaluation.sweep_table import table
from .generate import SAMPLE_PROMPT, SAMPLE_SEED, generate, load_model
from .generation.arguments import build_sweep_parser, typed_prompt
from .generation.request import HOST_OPTIONS, check_decoding, pixel_limit
from .inputs.budget import check_budget
from .machine.hardware import describe_machine, versions
from .machine.user_cache import model_key
from .models.adapters import adapter_key
from .models.loading import find_folder
from .pruners import AUTO

DEFAULT_METHODS = ("random", "norm", "divprune")
DEFAULT_RATIOS = (0.5, 0.25)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_sweep_parser(DEFAULT_METHODS, DEFAULT_RATIOS)
    with in_one_sentence(parser):
        run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Sweep where no other process writes to the same file."""
    _check(args)
    with writing_alone(args.json, "sweeping", "--json"):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Load the model once, measure all cases, print and write."""
    images, unread = _open_images(args)
    prompt = typed_prompt() if args.prompt == "-" else args.prompt
    model, processor = load_model(args)
    swept = swept_model(model, processor)
    ratios = args.keep_ratio or ([] if args.keep_tokens else DEFAULT_RATIOS)
    budgets = budgets_of(swept.N, ratios, args.keep_tokens or [])
    policies = [*dict.fromkeys(args.positions or (None,))]
    cases, refused = sweep_cases(swept, methods_of(args, DEFAULT_METHODS), budgets, policies)
    options = _answer_options(args)
    answer = partial(generate, model, processor, prompt, **options)
    plan = Rounds(args.runs, args.warmup, args.share)
    sweep = SweepRun(answer, images, full_case(swept), cases, plan)
    key = model_key(find_folder(args.model, args.revision))
    settings = [key, *_settings(args, prompt, sweep, options)]
    resume_file = ResumeFile(args.json, settings, Round.of)
    try:
        sweep.run(resume_file)
    except KeyboardInterrupt:
        message = f"interrupted: {sweep.progress}; the same command goes on from there"
        print(f"\n{message}", file=sys.stderr)
        sys.exit(130)
    skipped = unread + [f"{[*images][i]}: {why}" for i, why in sweep.skipped.items()]
    result = _about(args, prompt, images) | {
        "model_key": key,
        "operations_cover": swept.counted,
        "rows": sweep_rows(sweep, swept),
        "refused": refused + refusals(sweep),
        "skipped": skipped,
    }
    write_atomically(args.json, json.dumps(result, indent=4, ensure_ascii=False) + "\n")
    resume_file.remove()
    print(table(result))
    print(f"Wrote {args.json}")


def _about(args: argparse.Namespace, prompt: str, images: Iterable[str]) -> dict[str, Any]:
    """What was measured, how, and on what machine."""
    return {
        "command": "sweep",
        "model": args.model or "scenes",
        **({"adapter_path": args.adapter_path} if args.adapter_path else {}),
        "prompt": prompt,
        "images": [*images],
        **{name: getattr(args, name) for name in ("runs", "warmup", "share", "max_tokens")},
        "dtype": args.dtype,
        "machine": describe_machine(),
        "versions": versions(),
    }


def methods_of(args: argparse.Namespace, default: Sequence[str]) -> Sequence[str]:
    """The methods to measure: with a budget alone, what `auto` chooses."""
    has_budget = bool(args.keep_ratio or args.keep_tokens)
    methods: Sequence[str] = args.pruner or ((AUTO,) if has_budget else default)
    return methods


def check_cases(args: argparse.Namespace) -> None:
    """Refuse methods, budgets and prompts that cannot be, in `explore` too. Raises UserError."""
    if "none" in (args.pruner or ()):
        raise UserError("--pruner none is what all are measured beside; name another")
    for ratio in args.keep_ratio or ():
        check_budget(ratio, None)
    for K in args.keep_tokens or ():
        check_budget(None, K)
    check_decoding(args.max_tokens, 0.0, 1.0, 0)
    if args.image and args.prompt is None:
        raise UserError("there is no --prompt; give one, or '-' to read it from stdin")


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before images and weights are read. Raises UserError."""
    check_cases(args)
    if args.prompt is None and args.model:
        raise UserError("there is no --image; give files or folders")
    check_target(args.json, replace=True)


def _open_images(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The images by name, and what was left out of folders; without any, the sample scene."""
    if args.image:
        limit = pixel_limit(args.max_pixels, vars(args))
        paths, unread = readable_images(args.image, limit)
        args.image = [*map(str, paths)]
        return {str(path): path for path in paths}, unread
    from .scenes import compose

    scene = compose(SAMPLE_SEED).image()
    args.image, args.prompt = [scene], args.prompt or SAMPLE_PROMPT
    return {f"scene {SAMPLE_SEED}": scene}, []


def _answer_options(args: argparse.Namespace) -> dict[str, Any]:
    """What all answers have in common."""
    return dict(
        max_tokens=args.max_tokens, chat_template_config=args.chat_template_config,
        max_pixels=args.max_pixels,
        host_options={name: getattr(args, name) for name in HOST_OPTIONS},
    )  # fmt: skip


def _settings(
    args: argparse.Namespace, prompt: str, sweep: SweepRun, options: dict[str, Any]
) -> list[Any]:
    """All that decides answers and times beside the model, but for the number of rounds."""
    adapter = adapter_key(args.adapter_path) if args.adapter_path else None
    digests = [
        hashlib.sha256(image.read_bytes() if isinstance(image, Path) else name.encode()).hexdigest()
        for name, image in sweep.images.items()
    ]
    cases = [
        (case.pipeline.spec if case.spec == AUTO else case.spec, case.K, case.pipeline.policy)
        for case in sweep.cases
    ]
    machine = [describe_machine(), versions(), os.environ.get("OMP_NUM_THREADS"), args.dtype]
    return [adapter, prompt, digests, cases, options, args.share, machine]


if __name__ == "__main__":
    main()
