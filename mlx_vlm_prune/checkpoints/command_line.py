"""What all command lines share: options, `--help`, `--version`, and how a command ends."""

import argparse
import difflib
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from .errors import EXTRAS, UserError, missing_package
from .startup import end_watch
from .version import __version__

PACKAGE, SCRIPT = "mlx_vlm_prune", "mlx-vlm-prune"
VERSION = f"{PACKAGE} {__version__}"
# Of an option that takes several values, at once or by repeating it.
SEVERAL: dict[str, Any] = {"nargs": "+", "action": "extend"}
# How MLX's RuntimeErrors begin where its compiler for CPUs cannot write, or is not there.
COMPILER_FAULTS = ("[Compile::eval_cpu]", "filesystem error: ")


def program(module: str) -> str:
    """How a module was started: `mlx-vlm-prune COMMAND` or `python -m`, for usage lines."""
    started = Path(sys.argv[0])
    command = module.removeprefix(PACKAGE).removeprefix(".").replace("_", "-")
    command = command.replace("benchmarks.", "bench ")
    if started.name == SCRIPT:
        return f"{SCRIPT} {command}".rstrip()
    if started.name == module:  # a console script of its own
        return module
    if started.parts[-2:] == (PACKAGE, "__main__.py"):
        return f"python -m {PACKAGE} {command}".rstrip()
    return f"python -m {module}"


class _HelpFormatter(argparse.HelpFormatter):
    """Ends an option's help with its default, unless the help names one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        is_unset = default is None or default is False or default == []
        if is_unset or default is argparse.SUPPRESS or "default" in text:
            return text
        if isinstance(default, list | tuple):
            return f"{text} (default: {' '.join(map(str, default))})"
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """A command line without abbreviations, with `--version`, that refuses in one sentence."""

    def __init__(self, module: str | None = None, **settings: Any):
        """`module` is what `python -m` takes; a subcommand has `prog` in its place."""
        if module:
            settings["prog"] = program(module)
        self.values: tuple[str, ...] = ()  # of the arguments that were parsed, as text
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **settings)
        self.add_argument("--version", action="version", version=VERSION, help="print the version")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's own; the values stay here, so that `with_flags` can spare them."""
        end_watch()
        print_any_character()
        parsed = super().parse_args(args, namespace)
        lists = (value if isinstance(value, list) else [value] for value in vars(parsed).values())
        texts = [v for values in lists for v in values if isinstance(v, str | Path)]
        self.values = tuple({text for v in texts for text in (str(v), str(Path(v))) if text})
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {on_a_line(message)} (--help lists the options)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = either(action.choices)
            raise argparse.ArgumentError(action, f"invalid choice: {value!r} (choose {choices})")

    @property
    def flags(self) -> dict[str, str]:
        """The flag of every option by its name in Python; those of subcommands too."""
        flags: dict[str, str] = {}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for subcommand in action.choices.values():
                    flags |= subcommand.flags
            elif action.option_strings and action.default is not argparse.SUPPRESS:
                flags[action.dest] = next(f for f in action.option_strings if f.startswith("--"))
        return flags

    def with_flags(self, sentence: str) -> str:
        """A sentence of the library with this command's flags in place of parameter names.

        `keep_ratio is 2` becomes `--keep-ratio is 2`, and `dtype='float32'` `--dtype float32`.
        A name of a single word, which may be a word of English, is replaced where its value
        follows. Parts of paths, of pruner specs and of quoted text stay, and so does what the
        user typed as an argument's value.
        """
        spared = [re.escape(v) for v in self.values if self._translate(v) != v]
        if not spared:
            return self._translate(sentence)
        longest_first = "|".join(sorted(spared, key=len, reverse=True))
        parts = re.split(f"({longest_first})", sentence)
        return "".join(part if i % 2 else self._translate(part) for i, part in enumerate(parts))

    def _translate(self, sentence: str) -> str:
        flags, start = self.flags, r"(?<![\w./\\:,='\"-])(?<!: )"
        names, long = "|".join(flags), "|".join(name for name in flags if "_" in name) or "(?!)"
        value = r"(?:['\"\d-]|nan|inf|None)"
        sentence = re.sub(
            rf"{start}({names})=(['\"]?)([\w.]+)\2", lambda m: f"{flags[m[1]]} {m[3]}", sentence
        )
        sentence = re.sub(rf"{start}({long})(?![\w/\\=]|\.\w)", lambda m: flags[m[1]], sentence)
        return re.sub(
            rf"(?:^|(?<=; )|(?<=and ))({names})(?= is {value})", lambda m: flags[m[1]], sentence
        )


def either(names: Iterable[Any]) -> str:
    """Names in words: `a, b or c`."""
    *first, last = map(str, names)
    return f"{', '.join(first)} or {last}" if first else last


def suggestion(name: str, known: Iterable[str]) -> str:
    """For an error: the three known names nearest to an unknown one, the nearest first."""
    return f"did you mean {either(difflib.get_close_matches(name, list(known), n=3, cutoff=0))}?"


def whole_number(least: int, text: str, most: int | None = None) -> int:
    """An option that is a whole number; `partial` it for a parser."""
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        to = "on" if most is None else f"to {most}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} {to}")
    return int(text)


class _NoteHandler(logging.Handler):
    """Writes what the library logs to stderr, as `note: …`."""

    def __init__(self, parser: Parser | None) -> None:
        super().__init__()
        self.parser = parser

    def emit(self, record: logging.LogRecord) -> None:
        note = record.getMessage()
        if sys.stderr:
            note = self.parser.with_flags(note) if self.parser else note
            print(f"note: {on_a_line(note)}", file=sys.stderr)


@contextmanager
def notes_on_stderr(parser: Parser | None = None) -> Iterator[None]:
    """Inside the block the library's messages, from level INFO on, go to stderr.

    Of two blocks inside one another the inner one writes. `parser` says which flags a note names.
    """
    logger = logging.getLogger(PACKAGE)
    handlers, level = logger.handlers, logger.level
    others = [handler for handler in handlers if not isinstance(handler, _NoteHandler)]
    logger.handlers = [*others, _NoteHandler(parser)]
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers = handlers
        logger.setLevel(level)


@contextmanager
def in_one_sentence(parser: Parser | None = None) -> Iterator[None]:
    """How a command ends: a mistake, a missing package or a file that cannot be written in one
    sentence and exit code 2; an interrupt in 130; silently where a reader such as `head` has gone.

    What the library logs goes to stderr. `parser` says which flags a sentence names.
    """
    print_any_character()
    try:
        with notes_on_stderr(parser):
            yield
        print(end="", flush=True)  # a reader may be gone, or there may be none
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as problem:
        sentence = sentence_of(problem)
        if sentence is None:
            raise
        is_mistake = isinstance(problem, UserError)
        _refuse(parser.with_flags(sentence) if parser and is_mistake else sentence)
    except KeyboardInterrupt:
        end_line()
        sys.exit(130)


def sentence_of(problem: Exception) -> str | None:
    """What a user is told of an error: a mistake, a missing package, a file that cannot be read or
    written, a compiler that is not there. None of any other error, which is a fault of ours."""
    if isinstance(problem, UserError):
        return str(problem)
    if isinstance(problem, ModuleNotFoundError):
        package = (problem.name or "").partition(".")[0]
        return str(missing_package(package)) if package in EXTRAS else None
    if isinstance(problem, OSError):
        return f"{problem.filename or 'output'}: {problem.strerror or problem}"
    if isinstance(problem, RuntimeError) and str(problem).startswith(COMPILER_FAULTS):
        return (
            f"MLX cannot compile in {os.environ.get('TMPDIR', '/tmp')}: is there room, and a C++"
            " compiler (g++)? TMPDIR names another folder for temporary files"
        )
    return None


def on_a_line(sentence: str) -> str:
    """A sentence for a terminal: characters that would move its cursor as their escapes, and words
    of more than 300 characters, which no name has, without their middle."""
    plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence)
    return re.sub(r"(\S{100})\S{200,}(\S{40})", r"\1…\2", plain)


def print_any_character() -> None:
    """From now on a character that the output's encoding lacks is printed as its escape."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def end_line() -> None:
    """On a terminal, end the line that was interrupted, so that the prompt has one of its own."""
    for stream in (sys.stdout, sys.stderr):
        if stream and stream.isatty():
            with suppress(OSError):
                print(file=stream, flush=True)
            return


def _refuse(sentence: str) -> NoReturn:
    print(f"error: {on_a_line(sentence)}", file=sys.stderr)
    sys.exit(2)
