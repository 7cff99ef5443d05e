"""Answer requests over HTTP as OpenAI's API has them, each with a budget of its own.

mlx-vlm-prune serve --model my-model --pruner divprune --keep-ratio 0.25
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from .checkpoints.command_line import in_one_sentence
from .checkpoints.errors import UserError
from .generation.arguments import build_serve_parser
from .generation.stream import default_pruner
from .hosts.loading import load
from .inputs.image import MAX_PIXELS
from .serving.listening import expect_sigterm, listen
from .serving.settings import DEFAULT_METHOD, KEY_VARIABLE, LOOPBACK, ServerSettings

__all__ = ["main"]

logger = logging.getLogger("mlx_vlm_prune")
OPEN_HOST = (
    "any program that reaches this machine can use this server: give --api-key, or --host 127.0.0.1"
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake in it ends in one sentence and exit code 2."""
    parser = build_serve_parser(MAX_PIXELS)
    with in_one_sentence(parser):
        run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Load the model and answer until a signal comes; then the requests so far are answered."""
    from .serving.build import build_server
    from .serving.connections import build_uvicorn, url_of

    settings_of(args)  # refuses what cannot be before the model is read
    with listen(args.host, args.port) as listening:
        model, processor = load(
            args.model, dtype=args.dtype, revision=args.revision, adapter_path=args.adapter_path
        )
        settings = settings_of(args, model)
        if args.host not in LOOPBACK and not settings.api_key:
            logger.warning(OPEN_HOST)
        server = build_uvicorn(build_server(model, processor, settings), settings)
        expect_sigterm(server, lambda: os._exit(128 + signal.SIGTERM))
        url = url_of(args.host, listening)
        print(f"{settings.model_name}: {url}", file=sys.stderr, flush=True)
        server.run([listening])


def settings_of(args: argparse.Namespace, model: Any = None) -> ServerSettings:
    """The options of the command line; those that it leaves open, as the model's config has them.

    Raises UserError.
    """
    trained = default_pruner(model)
    budgets = (args.keep_ratio, args.keep_tokens, args.ms)
    method = args.pruner or (DEFAULT_METHOD if trained == "none" else trained)
    if method == "none" and any(budget is not None for budget in budgets):
        raise UserError("a budget needs a pruner other than none, for example divprune")
    if not 0 <= args.cache_gb < float("inf"):
        raise UserError(f"cache_gb is {args.cache_gb}; it must be a number, 0 or more")
    is_given = args.pruner is not None or any(budget is not None for budget in budgets)
    return ServerSettings(
        model_name="scenes" if args.model is None else public_name(str(args.model)),
        method=method,
        is_pruning=is_given or trained != "none",
        keep_ratio=args.keep_ratio,
        keep_tokens=args.keep_tokens,
        budget_ms=args.ms,
        caution=args.caution,
        host=args.host,
        max_pixels=args.max_pixels,
        max_images=args.max_images,
        allow_url=args.allow_url,
        queue=args.queue,
        batch=args.batch,
        timeout=args.timeout,
        api_key=args.api_key or os.environ.get(KEY_VARIABLE),
        cache_bytes=int(args.cache_gb * 1e9),
    )


def public_name(model: str) -> str:
    """What clients call a model: a folder by its name alone, since its path says who runs it."""
    return os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model


if __name__ == "__main__":
    main()
