"""Answer a prompt about images with fewer visual tokens, by our loop or by mlx-vlm's.

mlx-vlm-prune generate --image photo.jpg --prompt "…" --pruner avgpool --keep-ratio 0.25

Without arguments: a sample question about a sample scene, full beside pruned.
"""

import argparse
import inspect
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .checkpoints.command_line import in_one_sentence
from .checkpoints.errors import UserError
from .checkpoints.reading.files import atomic_path, check_target, write_atomically
from .generation import batch, stream
from .generation.arguments import build_parser, decoding_options, typed_prompt
from .generation.checkpoint_notes import note_sampling, note_thinking
from .generation.comparison import (
    Comparison,
    compare,
    compared_overlay,
    comparison_lines,
    ways_to_answer,
)
from .generation.photographs import warn_of_photographs
from .generation.printing import (
    LINE,
    as_json,
    print_figures,
    print_piece,
    read_whole,
)
from .generation.request import (
    GenerateOptions,
    LogitsProcessor,
    Request,
    Sampler,
    check_decoding,
    check_sampling_options,
    list_images,
    make_request,
    pixel_limit,
)
from .generation.result import GenerationResponse, GenerationResult
from .generation.speculation import check_num_draft_tokens
from .generation.stream import default_pruner
from .hosts import stream as host_stream
from .hosts.auto import Why, noted, noting, with_method
from .hosts.loading import load
from .inputs.budget import DEFAULT_KEEP_RATIO, check_budget
from .inputs.image_sources import ImageSource
from .inputs.video import VideoSource
from .models.vlm import VLM
from .planning.budgets import BudgetChoice
from .planning.command_budget import budget_of, limits_of
from .pruners import AUTO, Pipeline, Pruner
from .pruners.contract import Policy
from .training.generate_options import apply_config

if TYPE_CHECKING:
    from typing import Unpack

__all__ = ["batch_generate", "generate", "main", "stream_generate"]

logger = logging.getLogger("mlx_vlm_prune")
SAMPLE_SEED = 1_000_000_007  # held out: the built-in model never saw this scene
OPTIONS = GenerateOptions.__annotations__.keys()
SAMPLE_PROMPT = "What does the sign say?"
SAMPLE_OVERLAY = Path("sample-kept.png")  # so that no file of a user is replaced


def stream_generate(
    model: Any, processor: Any, prompt: str,
    image: ImageSource | Sequence[ImageSource] | None = None,
    *,
    pruner: str | Pruner | Pipeline | None = None,
    keep_ratio: float | None = None, keep_tokens: int | None = None, caution: bool = True,
    positions: Policy | None = None,
    max_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
    top_k: int = 0, min_p: float = 0.0, repetition_penalty: float | None = None,
    repetition_context_size: int = 20,
    sampler: Sampler | None = None, logits_processors: Sequence[LogitsProcessor] | None = None,
    eos_tokens: Sequence[str | int] | None = None, num_draft_tokens: int | None = None,
    system: str | None = None, chat_template_config: Mapping[str, Any] | None = None,
    max_pixels: int | None = None, allow_url: bool = False,
    host_options: Mapping[str, Any] | None = None, video: VideoSource | None = None,
    fps: float = 2.0, max_frames: int = 32,
) -> Iterator[GenerationResponse]:  # fmt: skip
    """Answer a prompt about any number of images, one piece of text at a time. Raises UserError.

    `<image>` in the prompt marks an image's place. `pruner`, "NAME", "NAME:option=value" or a chain
    "NAME+NAME", keeps K of an image's N visual tokens (a decoder method: on average) by
    `keep_ratio` or `keep_tokens`, half without either. By default it is what the checkpoint was
    trained with inside, else with a budget "auto", which chooses one, and without "none". With
    `caution` "auto" keeps more for documents, reading, counting and places. `positions` are the
    paper's. `sampler` and `logits_processors` are mlx-lm's; a sampler replaces `temperature` (0 is
    greedy), `top_p`, `top_k`, `min_p` and `seed`. These, and `repetition_penalty` of the latest
    `repetition_context_size` tokens, are mlx-lm's own; `temperature` and `top_p` need no mlx-lm.
    `eos_tokens` end an answer beside the model's. A twig may guess `num_draft_tokens` ahead.
    `max_pixels` limits images; larger JPEGs are scaled. `allow_url` allows public http(s) URLs.
    `chat_template_config` are the template's options, `host_options` mlx-vlm's: prefill_step_size,
    kv_bits, quantized_kv_start, max_kv_size (rows), resize_shape, processor_kwargs. Qwen models
    answer about a `video`, a file, a folder or a list of frames: `fps` frames a second, at most
    `max_frames`. Its budget is one for the whole clip.
    """
    options: Any = {name: value for name, value in locals().items() if name in OPTIONS}
    request = make_request(prompt, image, options)
    check_num_draft_tokens(num_draft_tokens, temperature, isinstance(model, VLM))
    request, why = with_method(model, processor, request)
    loop = stream if isinstance(model, VLM) else host_stream
    yield from noting(loop.stream_generate(model, processor, request), why)


def generate(
    model: Any,
    processor: Any,
    prompt: str,
    image: ImageSource | Sequence[ImageSource] | None = None,
    *,
    verbose: bool = False,
    **options: "Unpack[GenerateOptions]",
) -> GenerationResult:
    """The whole answer at once; the options are those of `stream_generate`.

    With `verbose` the text is printed as it comes.
    """
    return read_whole(stream_generate(model, processor, prompt, image, **options), verbose)


def batch_generate(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[ImageSource | Sequence[ImageSource] | None] | None = None,
    **options: "Unpack[GenerateOptions]",
) -> list[GenerationResult]:
    """Answer several prompts, each about its own images: what `generate` answers to each alone.

    `images` has an entry for each prompt: an image, several, or None. The options are those of
    `stream_generate`; num_draft_tokens is for one prompt. A model of ours reads all prompts at
    once that have the same method and budget, which "auto" may choose for each: memory grows with
    their number, and these wait for the longest answer. Times, speeds and `peak_memory` are of
    such a batch, `cache_bytes` an equal share of its padded cache.
    mlx-vlm's models answer one after another. Raises UserError, which names a prompt that is at
    fault by its number, from 1.
    """
    requests = batch.batch_requests(prompts, images, options)
    if isinstance(model, VLM):
        resolved: list[tuple[Request, Why | None]] = []
        for number, request in enumerate(requests, 1):
            before = resolved[-1][1] if resolved else None
            with batch.naming_prompt(number, len(requests)):
                resolved.append(with_method(model, processor, request, before))
        answers = batch.generate_by_budget(model, processor, [request for request, _ in resolved])
        pairs = zip(answers, resolved, strict=True)
        return [noted(answer, why) for answer, (_, why) in pairs]
    results = []
    for number, request in enumerate(requests, 1):
        with batch.naming_prompt(number, len(requests)):
            results.append(generate(model, processor, request.prompt, request.images, **options))
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Load a model, answer once or twice, and write the files."""
    apply_config(args)
    is_sample = not (args.image or args.video) and args.prompt is None and args.model is None
    _check(args, is_sample)
    if is_sample:
        _use_sample(args)
    elif args.prompt is None:
        raise UserError("there is no --prompt; give one, or '-' to read it from stdin")
    args.image = list_images(args.image, args.allow_url)
    prompt = typed_prompt() if args.prompt == "-" else args.prompt
    limits = limits_of(args)
    if args.model is None:  # else its own method may be the default
        _check_has_pruner(args, args.pruner or "none")
    model, processor = load_model(args)
    _check_has_pruner(args, args.pruner or default_pruner(model))
    budget, choice, why = budget_of(args, model, processor, prompt, limits)
    options = decoding_options(args)
    options |= {"image": args.image, "num_draft_tokens": args.num_draft_tokens}
    if choice and not choice.reason and args.verbose:
        print(choice)
    compares = args.compare and budget["pruner"] != "none"
    ways = ways_to_answer(options, budget, compares)
    if compares or choice:
        for way in ways.values():
            generate(model, processor, prompt, **way | {"max_tokens": 1})  # warm
    answers = {
        name: _answer(args, model, processor, prompt, way, name) for name, way in ways.items()
    }
    *_, last = answers
    answer = answers[last] = noted(answers[last], why)
    comparison = None
    if choice and args.verbose:
        print(choice.outcome(answer))
    if compares and (args.verbose or args.json or args.overlay):
        comparison = compare(partial(generate, model, processor, prompt), ways)
    if comparison and args.verbose:
        print(LINE, "Full and pruned")
        print("\n".join(comparison_lines([*answers.values()], comparison)))
    _write_files(args, answers, choice, comparison)


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model that a command line names; a note where it cannot know the images."""
    model, processor = load(
        args.model, dtype=args.dtype, revision=args.revision, adapter_path=args.adapter_path,
        trust_remote_code=getattr(args, "trust_remote_code", False),
    )  # fmt: skip
    limit = pixel_limit(getattr(args, "max_pixels", None), vars(args))
    warn_of_photographs(processor, args.image, limit)
    note_sampling(model, processor, getattr(args, "temperature", 1.0))
    note_thinking(processor, args.chat_template_config)
    return model, processor


def _write_files(
    args: argparse.Namespace, answers: Mapping[str, GenerationResult],
    choice: BudgetChoice | None, comparison: Comparison | None,
) -> None:  # fmt: skip
    *before, answer = answers.values()
    if args.overlay:
        with atomic_path(args.overlay, replace=True) as beside:
            picture = compared_overlay(answers, comparison) if comparison else answer.overlay()
            picture.save(beside, format="PNG")
        if args.verbose:
            print(f"Overlay: {args.overlay}")
    if args.json:
        figures = {"command": "generate"} | as_json(answer)
        figures |= {
            name: as_json(one) for name, one in zip(("full", "pruned"), before, strict=False)
        }
        figures |= {"comparison": comparison.as_json()} if comparison else {}
        figures |= {"budget": choice.as_json(answer)} if choice else {}
        write_atomically(args.json, json.dumps(figures, indent=4, ensure_ascii=False) + "\n")


def _answer(
    args: argparse.Namespace,
    model: Any,
    processor: Any,
    prompt: str,
    options: dict[str, Any],
    title: str,
) -> GenerationResult:
    """Stream one answer to stdout, with mlx-lm's lines around it."""
    for response in stream_generate(model, processor, prompt, **options):
        if args.verbose and response.generation_tokens == 1:
            print(LINE, title) if title else print(LINE)
        print_piece(response.text)
    print()
    answer = response.result
    assert answer, "the last piece has the result"
    if args.verbose:
        print(LINE)
        print_figures(answer)
    return answer


def _has_budget(args: argparse.Namespace) -> bool:
    budgets = (args.keep_ratio, args.keep_tokens, args.ms, args.gb)
    return any(budget is not None for budget in budgets)


def _check_has_pruner(args: argparse.Namespace, pruner: str) -> None:
    """Raises UserError for a comparison of nothing."""
    if pruner == "none" and args.compare and (args.pruner or not _has_budget(args)):
        raise UserError("--compare needs a budget or a --pruner to compare with all visual tokens")


def _use_sample(args: argparse.Namespace) -> None:
    from .scenes import compose

    args.image, args.prompt = [compose(SAMPLE_SEED).image()], SAMPLE_PROMPT
    args.pruner = args.pruner or AUTO
    if args.pruner != "none" and not _has_budget(args):
        args.keep_ratio = DEFAULT_KEEP_RATIO
    args.compare, args.overlay = args.pruner != "none", args.overlay or SAMPLE_OVERLAY
    print(f"Sample scene {SAMPLE_SEED}: {args.prompt}")


def _check(args: argparse.Namespace, is_sample: bool) -> None:
    """Refuse wrong options, and files that cannot be written, before any work."""
    check_budget(args.keep_ratio, args.keep_tokens)
    check_decoding(args.max_tokens, args.temperature, args.top_p, args.seed)
    check_sampling_options(
        args.top_k, args.min_p, args.repetition_penalty, args.repetition_context_size
    )
    check_num_draft_tokens(args.num_draft_tokens, args.temperature, True)
    for path in filter(None, (args.json, args.overlay)):
        check_target(path, replace=True)
    if args.overlay and not (args.image or args.video) and not is_sample:
        raise UserError("--overlay needs an --image or a --video")
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
__signature__ = inspect.signature(generate)  # of the module as a function

if __name__ == "__main__":
    main()
