"""The options of the commands that ask a model: generate, chat, sweep, explore, serve and app.

A value is checked where it is used, so that a Python caller gets the same refusal. An option's
destination is the name of the parameter in Python.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoints.command_line import SEVERAL, Parser, whole_number
from ..inputs.image import MAX_PIXELS, MOST_PIXELS
from ..models.loading import DTYPES
from ..pruners.own_methods import method_spec
from .json_options import MergeOptions, json_object
from .request import HOST_OPTIONS
from .video_arguments import add_video, video_options

DESCRIPTION = """Answer a prompt about images with fewer visual tokens. Without a model, an image
and a prompt the built-in model answers a sample question, with all visual tokens and with half."""

CHAT_DESCRIPTION = """Ask several questions about images or a video, one per line; /help lists
the other commands. You can add images and change the pruning between two questions."""

SWEEP_DESCRIPTION = """Measure methods at several budgets on your own images and compare them with
answers with all visual tokens; both alternate. Without an image: a drawn scene."""
SWEEP_EPILOG = """example: mlx-vlm-prune sweep --model my-model --image photos
--prompt "What is this?" --pruner norm divprune --keep-ratio 0.5 0.25 --json sweep.json"""

EXPLORE_DESCRIPTION = """Write a page that shows what methods kept of your images, step by step,
compares the answers with the full one, and shows what each token of an answer lost."""
EXPLORE_EPILOG = """example: mlx-vlm-prune explore --model my-model --image photo.jpg
--prompt "What is this?" --pruner divprune fastv --keep-ratio 0.5 0.25 --out page.html"""
SERVE_DESCRIPTION = """Serve OpenAI's API over HTTP. A request can set how many visual tokens are
kept, by visual_tokens, keep_ratio, pruner, budget_ms, or the detail of a picture."""
SERVE_EPILOG = """example: mlx-vlm-prune serve --model my-model --pruner divprune
--keep-ratio 0.25"""
APP_DESCRIPTION = """Chat about pictures in a browser. Each question is answered with all visual
tokens and with the kept ones, which the page shows. Only this machine can reach the page."""
OF_RESIZED = f", and with --resize-shape {MOST_PIXELS:,}"  # pixels of an image
CAUTION_HELP = (
    "with auto, keep more tokens of documents and for prompts about reading, counting or places"
)
Add = Callable[..., Any]


# fmt: off
def build_parser() -> Parser:
    """The command line of `generate`, its options in groups."""
    parser = Parser("mlx_vlm_prune.generate", description=DESCRIPTION)
    _add_config(_add_model(parser))
    _add_image_and_prompt(parser)
    _add_pruning(parser)
    _add_decoding(parser)
    _add_output(parser)
    _add_mlx_vlm(parser)
    return parser


def build_chat_parser() -> Parser:
    """The command line of `chat`."""
    parser = Parser("mlx_vlm_prune.chat", description=CHAT_DESCRIPTION)
    _add_config(_add_model(parser))
    add = parser.add_argument_group("images and prompt").add_argument
    _add_image(add, OF_RESIZED)
    add_video(add)
    _add_template_config(add)
    add = parser.add_argument_group("pruning").add_argument
    _add_pruner(add)
    _add_budget(add)
    _add_decoding(parser)
    _add_mlx_vlm(parser)
    return parser


def build_sweep_parser(methods: Sequence[str], ratios: Sequence[float]) -> Parser:
    """The command line of `sweep`, with its default methods and ratios."""
    parser = Parser("mlx_vlm_prune.sweep", description=SWEEP_DESCRIPTION, epilog=SWEEP_EPILOG)
    _add_model(parser)
    add = parser.add_argument_group("images and prompt").add_argument
    add("--image", **SEVERAL, metavar="PATH",
        help="image files, or folders of them (default: a drawn scene)")
    add_max_pixels(add, OF_RESIZED)
    _add_prompt(add)
    _add_template_config(add)
    add = parser.add_argument_group("pruning").add_argument
    _add_methods(add, methods, ratios)
    add("--positions", choices=("keep", "renumber"), **SEVERAL,
        help="kept tokens keep their positions or are renumbered; give both to measure both"
        " (default: as in the method's paper)")
    add = parser.add_argument_group("run").add_argument
    add("--runs", type=partial(whole_number, 1), default=5, metavar="N",
        help="rounds for each image that are counted")
    add("--warmup", type=partial(whole_number, 0), default=1, metavar="N",
        help="rounds for each image before these, not counted")
    add("--share", type=partial(whole_number, 1), default=4, metavar="N",
        help="pruned answers after each full one")
    add("--max-tokens", "-m", type=int, default=64, metavar="N", help="longest answer, in tokens")
    add("--json", type=Path, default=Path("sweep.json"), metavar="FILE",
        help="result file; an interrupted sweep is kept beside it")
    _add_mlx_vlm(parser)
    return parser


def build_explore_parser(methods: Sequence[str], ratios: Sequence[float]) -> Parser:
    """The command line of `explore`, with its default methods and ratios."""
    parser = Parser("mlx_vlm_prune.explore", description=EXPLORE_DESCRIPTION, epilog=EXPLORE_EPILOG)
    _add_model(parser)
    add = parser.add_argument_group("images and prompt").add_argument
    _add_image(add)
    _add_prompt(add)
    _add_template_config(add)
    add = parser.add_argument_group("pruning").add_argument
    _add_methods(add, methods, ratios)
    add("--positions", choices=("keep", "renumber"),
        help="kept tokens keep their positions or are renumbered (default: as in the paper)")
    add = parser.add_argument_group("page").add_argument
    add("--max-tokens", "-m", type=int, default=64, metavar="N", help="longest answer, in tokens")
    add("--predict", action=argparse.BooleanOptionalAction, default=True,
        help="also predict times: for models of this package by a calibration of each method"
        " (seconds, or minutes for a large model; stored), for mlx-vlm's from counted operations")
    add("--out", type=Path, default=Path("explore.html"), metavar="FILE.html",
        help="the page; an existing file is replaced")
    return parser


def add_max_pixels(add: Add, exception: str = "") -> None:
    """The limit of an image's size, whose default has an `exception`."""
    add("--max-pixels", type=int, metavar="N",
        help="the most pixels of an image; a JPEG with more is decoded at a fraction of its size"
        f" (default: {MAX_PIXELS:,}{exception})")


def _add_methods(add: Add, methods: Sequence[str], ratios: Sequence[float]) -> None:
    add("--pruner", **SEVERAL, type=method_spec, metavar="SPEC",
        help=f"methods or chains, as in `generate` (default: auto with a budget, else"
        f" {', '.join(methods)})")
    add("--keep-ratio", type=float, **SEVERAL, metavar="R",
        help=f"shares of the visual tokens to keep (default: {' and '.join(map(str, ratios))})")
    add("--keep-tokens", type=int, **SEVERAL, metavar="K",
        help="numbers of visual tokens to keep (default: none)")


def build_serve_parser(max_pixels: int) -> Parser:
    """The command line of `serve`; a picture may have `max_pixels` at most."""
    parser = Parser("mlx_vlm_prune.serve", description=SERVE_DESCRIPTION, epilog=SERVE_EPILOG)
    _add_model(parser)
    about = "Defaults for requests that set none; without a default all visual tokens are kept."
    add = parser.add_argument_group("pruning", about).add_argument
    add("--pruner", type=method_spec, metavar="SPEC",
        help="NAME, NAME:option=value,… or a chain NAME+NAME; `pruners` lists the names, and NAME"
        " can be a file of your own (default: the checkpoint's own method, else auto for requests"
        " with a budget)")
    add("--caution", action=argparse.BooleanOptionalAction, default=True,
        help=CAUTION_HELP)
    _add_budget(add)
    add("--budget-ms", dest="ms", type=float, metavar="MS",
        help="keep as many tokens as fit this time to the first token, for one request at a time")
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=partial(whole_number, 0, most=65535), default=8080, metavar="PORT",
        help="port; 0 takes a free one")
    add("--api-key", metavar="KEY", help="bearer token that requests must have; better in the"
        " variable MLX_VLM_PRUNE_API_KEY, which other users cannot see (default: none)")
    add = parser.add_argument_group("limits").add_argument
    add("--max-pixels", type=partial(whole_number, 1), default=max_pixels, metavar="N",
        help="most pixels of a picture; larger ones are made smaller, with a warning")
    add("--max-images", type=partial(whole_number, 0), default=16, metavar="N",
        help="most images of a request")
    add("--allow-url", action="store_true",
        help="allow pictures from http(s) URLs, public addresses only, 64 MB per request")
    add("--batch", type=partial(whole_number, 1), default=16, metavar="N",
        help="most answers that are computed together")
    add("--queue", type=partial(whole_number, 0), default=64, metavar="N",
        help="most requests that wait; more are refused with 429")
    add("--timeout", type=float, default=600.0, metavar="S",
        help="most seconds for an answer")
    add("--cache-gb", type=float, default=1.0, metavar="GB",
        help="memory (10^9 bytes) for the cache of earlier prompts; 0: no cache")
    return parser


def build_app_parser() -> Parser:
    """The command line of `app`."""
    parser = Parser("mlx_vlm_prune.app", description=APP_DESCRIPTION)
    _add_model(parser)
    add = parser.add_argument_group("page").add_argument
    add("--port", type=partial(whole_number, 0, most=65535), default=7860, metavar="PORT",
        help="port on 127.0.0.1; 0 takes a free one")
    add("--max-tokens", "-m", type=partial(whole_number, 1), default=256, metavar="N",
        help="longest answer, in tokens")
    return parser


def _add_model(parser: Parser) -> Add:
    """The group, for an option more."""
    add = parser.add_argument_group("model").add_argument
    add("--model", help="folder or Hugging Face name (default: the built-in scenes model)")
    add(
        "--revision", help="branch, tag or commit of a Hugging Face name (default: its main branch)"
    )
    add("--adapter-path", metavar="FOLDER", help="adapters that were trained for the model"
        " (default: none)")
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="type of the weights and of the computation; auto is float32 on a CPU and the"
        " checkpoint's own type on a GPU")
    return add


def decoding_options(args: argparse.Namespace) -> dict[str, Any]:
    """What a command line says of the answer, as `stream_generate` takes it."""
    names = (
        "positions", "max_tokens", "temperature", "top_p", "seed", "top_k", "min_p",
        "repetition_penalty", "repetition_context_size", "eos_tokens", "system",
        "chat_template_config", "max_pixels",
    )
    host_options = {name: getattr(args, name) for name in HOST_OPTIONS}
    options = {name: getattr(args, name) for name in names} | video_options(args)
    return {**options, "host_options": host_options}


def typed_prompt() -> str:
    """The prompt from stdin; bytes that are no text are refused where it is tokenized."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin.read().strip()


def _add_config(add: Add) -> None:
    add("--trust-remote-code", action="store_true",
        help="refused: no code from a model's folder is run here")
    add("--config", "-c", type=Path, metavar="FILE.yaml", help="a config file of `train`: use the"
        " model trained with it, its pruner and its budget; flags override it (default: none)")


def _add_image_and_prompt(parser: Parser) -> None:
    add = parser.add_argument_group("image and prompt").add_argument
    _add_image(add, OF_RESIZED)
    add_video(add)
    _add_prompt(add)
    _add_template_config(add)


def _add_prompt(add: Add) -> None:
    add("--prompt", "-p", metavar="TEXT",
        help="the question; - reads it from stdin; <image> marks the place of an image (default:"
        " images come first)")


def _add_image(add: Add, exception: str = "") -> None:
    add("--image", **SEVERAL, default=[], metavar="FILE",
        help="image files (default: none)")
    add_max_pixels(add, exception)
    add("--allow-url", action="store_true",
        help="allow images from http(s) URLs, public addresses only")
    add("--system", "--system-prompt", metavar="TEXT",
        help="system message, before the first question (default: none)")


def _add_template_config(add: Add) -> None:
    add("--enable-thinking", dest="chat_template_config", action=MergeOptions, nargs=0,
        const={"enable_thinking": True}, help="turn on thinking, by the chat template's option of"
        " this name (default: as in the template)")
    add("--chat-template-config", type=json_object, action=MergeOptions, metavar="JSON",
        help='options of the chat template, such as {"open_thinking": true} (default: none)')


def _add_pruning(parser: Parser) -> None:
    add = parser.add_argument_group("pruning").add_argument
    _add_pruner(add)
    add("--num-draft-tokens", type=int, metavar="N",
        help="number of tokens that the model's twig drafts, 5 in TwigVLM; the greedy answer is"
        " the same (default: no drafting)")
    about = "How many of an image's N visual tokens to keep; without a budget, half of them."
    add = parser.add_argument_group("budget", about).add_argument
    _add_budget(add)
    add("--budget-ms", dest="ms", type=float, metavar="MS",
        help="keep as many tokens as fit this time to the first token, by a calibration of this"
        " machine")
    add("--budget-gb", dest="gb", type=float, metavar="GB",
        help="keep as many tokens as fit this peak memory (10^9 bytes)")


def _add_pruner(add: Add) -> None:
    add("--pruner", type=method_spec, metavar="SPEC",
        help="NAME, NAME:option=value,… or a chain NAME+NAME; `pruners` lists the names, NAME can"
        " be a file of your own, and auto chooses a method and says why (default: the checkpoint's"
        " own method, else auto with a budget and none without)")
    add("--caution", action=argparse.BooleanOptionalAction, default=True,
        help=CAUTION_HELP)
    add("--positions", choices=("keep", "renumber"),
        help="kept tokens keep their positions or are renumbered (default: as in the paper)")


def _add_budget(add: Add) -> None:
    add("--keep-ratio", type=float, metavar="R", help="share of N to keep, above 0, at most 1")
    add("--keep-tokens", type=int, metavar="K", help="keep at most this many of each image")


def _add_decoding(parser: Parser) -> None:
    add = parser.add_argument_group("decoding").add_argument
    add("--max-tokens", "-m", type=int, default=256, metavar="N", help="longest answer, in tokens")
    add("--temp", "--temperature", dest="temperature", type=float, default=0.0, metavar="T",
        help="sampling temperature; 0 takes the most likely token")
    add("--top-p", type=float, default=1.0, metavar="P",
        help="sample from the most likely tokens that together have this probability")
    add("--top-k", type=int, default=0, metavar="K",
        help="sample from the K most likely tokens, as in mlx-lm; 0: from all")
    add("--min-p", type=float, default=0.0, metavar="P",
        help="sample from tokens with at least this share of the most likely token's probability,"
        " as in mlx-lm")
    add("--seed", type=int, default=0, metavar="N", help="seed of the sampling")
    add("--repetition-penalty", type=float, metavar="X",
        help="penalty on the latest tokens, as in mlx-lm; above 1 (default: none)")
    add("--repetition-context-size", type=int, default=20, metavar="N",
        help="number of the latest tokens that the penalty is for")
    add("--extra-eos-token", "--eos-tokens", dest="eos_tokens", **SEVERAL,
        metavar="TOKEN", help="further tokens that end an answer (default: only the model's)")


def _add_output(parser: Parser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--compare", action="store_true",
        help="also answer with all visual tokens; time the answers in turns")
    add("--overlay", type=Path, metavar="FILE.png",
        help="draw the images with dropped tokens dark; with --compare, whole beside pruned")
    add("--json", type=Path, metavar="FILE", help="write the answer and all figures")
    add("--verbose", action=argparse.BooleanOptionalAction, default=True,
        help="print the figures of the answer")


def _add_mlx_vlm(parser: Parser) -> None:
    add = parser.add_argument_group("mlx-vlm models only").add_argument
    add("--prefill-step-size", type=int, metavar="ROWS",
        help="rows of the prompt read at once (default: mlx-vlm's)")
    add("--kv-bits", type=float, metavar="BITS",
        help="bits of a number in the key/value cache, 1.5 to 8 (default: not quantized)")
    add("--quantized-kv-start", type=int, metavar="ROWS",
        help="quantize the cache once it has this many rows (default: 5000)")
    add("--max-kv-size", type=int, metavar="ROWS",
        help="keep only the first four and the latest rows in the key/value cache (default: all)")
    add("--resize-shape", type=int, nargs="+", metavar="PIXELS",
        help="resize images to fit this width and height; one number for both (default: no)")
    add("--processor-kwargs", type=json_object, metavar="JSON",
        help='options of the model\'s own processor, such as {"do_image_splitting": false}'
        " (default: none)")
# fmt: on
