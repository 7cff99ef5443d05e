"""Runs command lines made from the commands' own parsers, with hostile values, one after another.

`python -m tests.command_fuzz SEED COUNT` prints a line of JSON for each that ended wrongly, and a
last one with how many ended how. No model is built: where one would be, a UserError says so.
"""

import argparse
import importlib
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from mlx_vlm_prune.checkpoints.command_line import Parser
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.scenes import CHECKPOINT

COMMANDS = {  # a module, and the names in other modules that would build a model or measure
    "mlx_vlm_prune.advise": (), "mlx_vlm_prune.app": (), "mlx_vlm_prune.bench": (),
    "mlx_vlm_prune.chat": (), "convert.__main__": (),
    "mlx_vlm_prune.encode": ("mlx_vlm_prune.encode.load_dual_encoder",),
    "mlx_vlm_prune.evaluate": (), "mlx_vlm_prune.explore": (),
    "mlx_vlm_prune.fuse": ("mlx_vlm_prune.fuse.load_folder",),
    "mlx_vlm_prune.generate": (), "mlx_vlm_prune.new_method": (), "mlx_vlm_prune.plot": (),
    "mlx_vlm_prune.pruners.listing": (),
    "mlx_vlm_prune.scan": ("mlx_vlm_prune.scan.measure",), "mlx_vlm_prune.serve": (),
    "mlx_vlm_prune.sweep": (),
    "mlx_vlm_prune.train": (),
}  # fmt: skip
MODELS = ("mlx_vlm_prune.models.loading._build", "mlx_vlm_prune.hosts.loading._load_mlx_vlm")
SECONDS, BYTES = 60, 8 << 30  # that a case may take, and that the process may map
TEXTS = [
    "", " ", "-", "--", "-1", "0", "1", "2", "0.5", "1e309", "nan", "inf", "9" * 30, "9" * 5000,
    "x", "~nosuchuser/x", "~", "..", "/proc/x", "/dev/null", "/dev/zero", "/proc/self/mem",
    "a" * 300, "\udcff", "\n", "%s", "{}", '{"a": 1}', "[" * 100_000, '{"a":' * 20_000, "[]",
    "D[1]", "*", "norm", "none", "norm+divprune", "restore", "twig:rank=3", "norm:keep=0", "x:y=z",
    "norm:" + "," * 50, "owner/name", "owner/name/x.pth", "a/b/c/d", "file://x", "scenes", "own",
    "model", "picture.png", "broken.json", "folder", "numbers.json", "questions.jsonl",
    "config.yaml",
]  # fmt: skip

GOOD_VALUES = {  # by the options' names in Python
    "model source": [str(CHECKPOINT), "model"], "image images": ["picture.png", "folder"],
    "json out evaluation merge": ["out.json", "out.html", "numbers.json"],
    "target save_path output answers": ["new", "new.pth"], "prompt system text": ["what is it ?"],
    "vision tokenizer adapter_path tower": ["model", "folder"],
    "chat_template_config processor_kwargs": ['{"a": 1}', "{}"],
    "keep_ratio temperature top_p min_p learning_rate": ["0.5", "1"],
    "pruner": ["norm", "divprune", "tome", "norm+restore", "twig", "twig:rank=9", "fastv:layer=1"],
    "name": ["norm", "twig", "duet"], "overlay plot": ["out.png"], "results": ["numbers.json"],
    "questions": ["questions.jsonl", "scenes"], "format": ["own", "scenes", "gqa"],
    "data": ["questions.jsonl"], "config": ["config.yaml"], "template": ["a {}"],
}  # fmt: skip
GOOD = {name: values for names, values in GOOD_VALUES.items() for name in names.split()}


class TooLong(BaseException):
    """A case took longer than it may."""


class Parsed(BaseException):
    """Ends a command once its parser is built."""


def reached(*arguments: Any, **options: Any) -> Any:
    raise UserError("a model would be built here")


def patched(path: str, value: Any) -> Any:
    """Put a value in place of a name of a module; what it was."""
    module, _, name = path.rpartition(".")
    home = importlib.import_module(module)
    before = getattr(home, name)
    setattr(home, name, value)
    return before


def parser_of(main: Callable[[list[str]], None]) -> Parser:
    """The parser of a command, as its `main` builds it."""
    built: list[Parser] = []

    def parse_args(self: Parser, *arguments: Any) -> None:
        built.append(self)
        raise Parsed

    before = Parser.parse_args
    Parser.parse_args = parse_args  # type: ignore[method-assign]  # for the parser alone
    try:
        main(["x"])
    except Parsed:
        pass
    finally:
        Parser.parse_args = before  # type: ignore[method-assign]  # put back
    return built[0]


def value(rng: random.Random, action: argparse.Action) -> str:
    """A value for an option: often a good one, else any."""
    if rng.random() < 0.4:
        return rng.choice(TEXTS)
    if action.choices:
        return str(rng.choice(list(action.choices)))
    if action.dest in GOOD:
        return rng.choice(GOOD[action.dest])
    return rng.choice(("0.5", "0.25") if action.type is float else ("1", "2", "7"))


def words(rng: random.Random, action: argparse.Action) -> Iterator[str]:
    """An option or a positional, with as many values as it takes, or a wrong number of them."""
    if action.option_strings:
        yield rng.choice(action.option_strings)
    count: Any = action.nargs
    if count is None:
        count = 1
    elif count in ("+", "*", "?"):
        count = {"+": rng.randint(1, 3), "*": rng.randint(0, 2), "?": rng.randint(0, 1)}[count]
    if rng.random() < 0.03:
        count = rng.randint(0, 3)
    for _ in range(count):
        yield value(rng, action)


def command_line(rng: random.Random, parser: Parser) -> list[str]:
    """Some of a parser's options in any order, and its positionals."""
    actions = [a for a in parser._actions if not isinstance(a, argparse._SubParsersAction)]
    options = [a for a in actions if a.option_strings and a.dest not in ("help", "version")]
    chosen = rng.sample(options, min(len(options), rng.choice((0, 1, 1, 2, 2, 3, 5, 8))))
    chosen += [a for a in options if a.required and a not in chosen and rng.random() < 0.9]
    chosen += [a for a in actions if not a.option_strings]
    rng.shuffle(chosen)
    line = [word for action in chosen for word in words(rng, action)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            name, way = rng.choice(list(action.choices.items()))
            line += [name, *command_line(rng, way)]
    if rng.random() < 0.02:
        line.insert(rng.randint(0, len(line)), rng.choice(("--no-such", "--help", "--version")))
    return line


def write_files(folder: Path) -> None:
    """What the values name: a picture, JSON, questions, a config, a folder that is no model."""
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(folder / "picture.png")
    (folder / "folder").mkdir()
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "minimind2_v"}')
    (folder / "broken.json").write_text("{")
    (folder / "numbers.json").write_text('{"rows": [1, 2], "command": "sweep"}')
    record = {"image": "picture.png", "question": "what ?", "answer": "yes"}
    (folder / "questions.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "config.yaml").write_text("stage: sft\nkeep_ratio: 2\n")


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path in a folder; of a file also its size and time."""
    present = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        is_folder = path.is_dir() and not path.is_symlink()
        present[str(path)] = (0, 0) if is_folder else (status.st_size, status.st_mtime_ns)
    return present


def outcome(main: Callable[[list[str]], None], line: list[str]) -> tuple[Any, str]:
    """The exit code, or the exception, of a command, and what it wrote to stderr."""
    code: Any = 0
    err = io.StringIO()
    sys.argv, sys.stdin = ["fuzz"], io.StringIO("typed\n")
    signal.alarm(SECONDS)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(err):
            main(line)
    except SystemExit as stop:
        code = stop.code
    except BaseException as problem:
        code = f"{type(problem).__name__}: {problem}"[:300]
    finally:
        signal.alarm(0)
    return code, err.getvalue()


def fault(code: Any, err: str, before: dict, after: dict) -> str | None:
    """What is wrong with how a command ended; None where it answered, or refused in a sentence."""
    if code not in (0, 2):
        return f"ended by {code}"
    lines = [text for text in err.splitlines() if text.strip() and not text.startswith("note: ")]
    if code == 2 and (not lines or not lines[-1].startswith("error: ")):
        return f"code 2 without a sentence: {err[-300:]!r}"
    if code == 2 and sum(text.startswith("error: ") for text in lines) != 1:
        return f"not one sentence: {err[-300:]!r}"
    if code == 2 and len(lines[-1]) > 2000:
        return f"a sentence of {len(lines[-1])} characters"
    if code == 2 and before != after:
        return f"left or changed {sorted(set(after.items()) ^ set(before.items()))[:3]}"
    return None


def give_up(number: int, frame: Any) -> None:
    raise TooLong(f"{SECONDS} seconds were not enough")


def run(seed: int, count: int) -> None:
    """Print what ended wrongly, then how many ended how."""
    rng, ends = random.Random(seed), Counter[str]()
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.signal(signal.SIGALRM, give_up)
    with tempfile.TemporaryDirectory() as top:
        home = Path(top) / "home"
        folder = home / "work"
        folder.mkdir(parents=True)
        os.environ |= {
            "HF_HUB_OFFLINE": "1", "HOME": str(home), "HF_HOME": str(home / "hub"),
            "MLX_VLM_PRUNE_CACHE": str(home / "cache"), "MPLCONFIGDIR": f"{top}/matplotlib",
        }  # fmt: skip
        os.chdir(folder)
        write_files(folder)
        mains = {name: importlib.import_module(name).main for name in COMMANDS}
        for path in (*MODELS, *(path for paths in COMMANDS.values() for path in paths)):
            patched(path, reached)
        parsers = {name: parser_of(main) for name, main in mains.items()}
        before = contents(home)
        for number in range(count):
            name = rng.choice(list(COMMANDS))
            line = command_line(rng, parsers[name])
            code, err = outcome(mains[name], line)
            after = contents(home)
            ends[f"{name} {code}"[:60]] += 1
            if wrong := fault(code, err, before, after):
                shown = [word if len(word) < 80 else f"{word[:40]}…" for word in line]
                print(
                    json.dumps({"number": number, "command": name, "line": shown, "fault": wrong})
                )
            before = after
    print(json.dumps(ends))


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]))
