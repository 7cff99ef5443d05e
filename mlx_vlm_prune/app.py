"""Chat about pictures in a browser: full and pruned answers side by side, and what was kept.

mlx-vlm-prune app --model my-model
"""

import argparse
import gc
import inspect
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .checkpoints.command_line import in_one_sentence
from .checkpoints.errors import UserError, missing_package
from .checkpoints.reading.paths import expand_home
from .generation.arguments import build_app_parser
from .serving.listening import expect_sigterm, listen
from .webui import BUILT_IN

if TYPE_CHECKING:  # what takes long is imported once the command has said what it does
    from .webui.model_thread import OpenModel

__all__ = ["main"]

HOST = "127.0.0.1"
SECONDS_TO_END = 1  # that open pages may take
# Gradio reads these while it is imported: it reports to nobody, and keeps no history of runs.
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake in it ends in one sentence and exit code 2."""
    parser = build_app_parser()
    with in_one_sentence(parser):
        run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Show the page until a signal comes. What was uploaded and drawn is removed then."""
    if find_spec("gradio") is None:
        raise missing_package("gradio")
    with listen(HOST, args.port) as listening, temporary_folder() as folder:
        place = f"http://{HOST}:{listening.getsockname()[1]}"
        say(f"{place} opens in some seconds with {first_name(args)}")
        os.environ |= {**QUIET, "GRADIO_TEMP_DIR": folder}
        with without_collections():
            from .webui.model_thread import Models, ModelThread

            thread = ModelThread()
            read = partial(open_model, args)
            opening = thread.start(read, first_name(args))  # while Gradio is imported
        with closing(thread):
            with without_stubs(), without_collections():
                import uvicorn

                from .webui.site import build_site

                models = Models(thread, opening.result(), read)
                del opening  # it would hold the first model for ever
                app = build_site(models, thread, Path(folder), args.max_tokens)
            settings = uvicorn.Config(
                app, log_level="critical", server_header=False,
                timeout_graceful_shutdown=SECONDS_TO_END,
            )  # fmt: skip
            server = uvicorn.Server(settings)
            expect_sigterm(server, partial(end_early, folder))
            say(f"{place} in a browser of this machine; Ctrl-C ends")
            server.run([listening])


def say(sentence: str) -> None:
    """A line on stderr."""
    print(sentence, file=sys.stderr, flush=True)


@contextmanager
def temporary_folder() -> Iterator[str]:
    """A folder that is removed behind the block, and by SIGTERM until uvicorn has that signal."""
    waits = (signal.SIGTERM,)
    signal.pthread_sigmask(signal.SIG_BLOCK, waits)
    try:
        with TemporaryDirectory(prefix="mlx-vlm-prune-", ignore_cleanup_errors=True) as folder:
            signal.signal(signal.SIGTERM, partial(end_early, folder))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, waits)
            yield folder
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, waits)


def end_early(folder: str, *_: object) -> None:
    """Remove the temporary folder and end at once: the thread that reads a model cannot be
    interrupted, and no exception is thrown into what is being imported."""
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(128 + signal.SIGTERM)


@contextmanager
def without_stubs() -> Iterator[None]:
    """Inside the block Gradio can be imported in half the time.

    It writes type stubs beside its components whenever they are imported, but for classes that
    have no file.
    """
    getfile = inspect.getfile

    def no_file_of_gradio(thing: Any) -> str:
        if isinstance(thing, type) and thing.__module__.startswith("gradio."):
            raise OSError("no stubs")
        return getfile(thing)

    inspect.getfile = no_file_of_gradio  # type: ignore[assignment]  # in this block alone
    try:
        yield
    finally:
        inspect.getfile = getfile


@contextmanager
def without_collections() -> Iterator[None]:
    """Inside the block imports take a fifth less: they make much, of which nothing can be freed."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def first_name(args: argparse.Namespace) -> str:
    """The name in the menu of the command line's model."""
    return args.model or BUILT_IN


def open_model(args: argparse.Namespace, name: str) -> "OpenModel":
    """The command line's model, the built-in one, or that of a folder, all in the command line's
    dtype. Of another than the first nothing is fetched. Raises UserError."""
    from .hosts.loading import load

    if name == first_name(args):
        options = {"revision": args.revision, "adapter_path": args.adapter_path}
        return warmed(name, *load(args.model, dtype=args.dtype, **options))
    if name == BUILT_IN:
        return warmed(name, *load(dtype=args.dtype))
    if not name:
        raise UserError("give the folder of a model")
    if not os.path.isdir(expand_home(name)):
        raise UserError(f"there is no folder {name}")
    return warmed(name, *load(expand_home(name), dtype=args.dtype))


def warmed(name: str, model: Any, processor: Any) -> "OpenModel":
    """A model that was asked once, so that a first answer takes no longer than others."""
    from .chat import Chat
    from .generate import SAMPLE_PROMPT, SAMPLE_SEED
    from .scenes import compose
    from .webui.model_thread import OpenModel

    opened = OpenModel(name, model, processor, partial(Chat, model, processor))
    with suppress(UserError):  # of a tokenizer that has not these words
        opened.new_chat(max_tokens=1).ask(SAMPLE_PROMPT, compose(SAMPLE_SEED).image())
    return opened


if __name__ == "__main__":
    main()
