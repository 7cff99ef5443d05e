"""Promises of every command line: its options are explained, whole, and named as it was called."""

import argparse
import ast
import importlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from mlx_vlm_prune import encode, evaluate, generate
from mlx_vlm_prune.__main__ import COMMANDS
from mlx_vlm_prune.__main__ import main as package_main
from mlx_vlm_prune.checkpoints.command_line import VERSION, Parser, in_one_sentence, program
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.processor import TOKENIZER_ADVICE
from mlx_vlm_prune.generation import arguments
from mlx_vlm_prune.generation.arguments import build_parser

from .entry_points import modules

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    name
    for name, is_command in modules("mlx_vlm_prune", "torch_ref", "convert", "benchmarks")
    if is_command and name != "mlx_vlm_prune"
]


class Parsed(Exception):
    """Ends a command once its parser is built."""


def command(module: str):
    """A command's `main`."""
    home = importlib.import_module(module)
    if not hasattr(home, "main"):
        home = importlib.import_module(f"{module}.__main__")
    return home.main


def parsers(parser: Parser) -> Iterator[Parser]:
    """A parser and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subcommand in action.choices.values():
                yield from parsers(subcommand)


@pytest.fixture(params=MODULES)
def parser(request, monkeypatch):
    """The command line of a command, taken when it is about to be used."""
    built = []

    def parse_args(self, *arguments):
        built.append(self)
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parse_args)
    with pytest.raises(Parsed):
        command(request.param)(["x"])
    return built[0]


def test_every_option_has_a_help_text_its_default_and_its_choices(parser):
    for each in parsers(parser):
        formatter = each._get_formatter()
        for action in each._actions:
            if isinstance(action, argparse._SubParsersAction):
                assert len(action._choices_actions) == len(action.choices), each.prog
                assert all(way.help for way in action._choices_actions), each.prog
                continue
            assert action.help, (each.prog, action.dest)
            text = formatter._expand_help(action)
            if not any(action.default is unset for unset in (None, False, argparse.SUPPRESS)):
                several = isinstance(action.default, list | tuple)
                default = " ".join(map(str, action.default)) if several else str(action.default)
                assert "default" in text and default in text, (each.prog, action.dest)
            for choice in action.choices or ():
                assert str(choice) in each.format_help(), (each.prog, choice)


def test_no_command_line_takes_abbreviations_and_all_have_a_version(parser):
    for each in parsers(parser):
        assert isinstance(each, Parser) and not each.allow_abbrev, each.prog
        assert "--version" in each._option_string_actions


def test_an_option_without_help_or_with_a_hidden_default_would_be_noticed():
    parser = Parser("mlx_vlm_prune.generate")
    parser.add_argument("--n", type=int, default=3, help="a number")
    assert "a number (default: 3)" in parser.format_help()
    parser.add_argument("--zero", type=int, default=0, help="none")
    assert "none (default: 0)" in parser.format_help()


@pytest.mark.parametrize("module", MODULES)
def test_every_command_prints_the_version(module, capsys):
    with pytest.raises(SystemExit) as stop:
        command(module)(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"{VERSION}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_package_prints_the_version(name, capsys):
    with pytest.raises(SystemExit) as stop:
        package_main([name, "--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"{VERSION}\n")


CALLS = {
    "bin/mlx-vlm-prune": "mlx-vlm-prune generate",
    "bin/mlx_vlm_prune.generate": "mlx_vlm_prune.generate",
    "site-packages/mlx_vlm_prune/__main__.py": "python -m mlx_vlm_prune generate",
    "site-packages/mlx_vlm_prune/generate.py": "python -m mlx_vlm_prune.generate",
    "anything": "python -m mlx_vlm_prune.generate",
}


@pytest.mark.parametrize("started", CALLS)
def test_the_usage_names_a_command_as_it_was_called(started, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [started])
    assert program("mlx_vlm_prune.generate") == CALLS[started]
    assert build_parser().format_usage().startswith(f"usage: {CALLS[started]} [-h]")


def test_the_console_script_lists_the_commands_by_its_own_name(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bin/mlx-vlm-prune", "--help"])
    package_main()
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "usage: mlx-vlm-prune COMMAND …"
    assert [line.split()[0] for line in rest if line.startswith("  ")] == list(COMMANDS)


def test_the_converter_alone_lists_its_ways_in_a_line_each(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        command("convert")([])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    ways = err.split("ways:\n")[1].splitlines()[1:]
    names = ["inspect", "to-mlx", "to-torch", "to-hf", "prune-into"]
    assert [line.split()[0] for line in ways] == names
    assert all(len(line.split()) > 3 for line in ways)


def test_the_help_of_generate_groups_its_options():
    lines = build_parser().format_help().splitlines()
    headings = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "options", "model", "image and prompt", "pruning", "budget", "decoding", "output",
        "mlx-vlm models only",
    ]  # fmt: skip


def test_help_names_no_option_of_another_command():
    for build in (
        build_parser, arguments.build_chat_parser, arguments.build_app_parser,
        partial(arguments.build_sweep_parser, (), ()), partial(arguments.build_serve_parser, 1),
        partial(arguments.build_explore_parser, (), ()),
    ):  # fmt: skip
        parser = build()
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", parser.format_help()))
        assert named <= {*parser._option_string_actions}, parser.prog


SENTENCES = {  # of the library, and of the command `generate`
    "keep_ratio is 2; it must be at most 1": "--keep-ratio is 2; it must be at most 1",
    "give keep_ratio or keep_tokens, not both": "give --keep-ratio or --keep-tokens, not both",
    "temperature is -1; it must be 0 or more": "--temp is -1; it must be 0 or more",
    "ms is nan; it must be above 0": "--budget-ms is nan; it must be above 0",
    "max_tokens is 1, and temperature is 0.5": "--max-tokens is 1, and --temp is 0.5",
    "NaN; try dtype='float32'": "NaN; try --dtype float32",
    # words of English, paths, quotes, and options of methods
    "model is a folder; the image is broken": "model is a folder; the image is broken",
    "there is no keep_ratio/config.json": "there is no keep_ratio/config.json",
    "a/keep_ratio.json: seed is 3": "a/keep_ratio.json: seed is 3",
    "no pruner is called 'keep_tokens'": "no pruner is called 'keep_tokens'",
    "random:seed=1 is refused": "random:seed=1 is refused",
    "config.json: max_tokens is 3": "config.json: max_tokens is 3",
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_command_puts_its_flags_in_place_of_parameters(sentence, capsys):
    with pytest.raises(SystemExit) as stop, in_one_sentence(build_parser()):
        raise UserError(sentence)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {SENTENCES[sentence]}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image", "keep_ratio"], "there is no image file keep_ratio"),
        (["--image=./keep_ratio"], "there is no image file ./keep_ratio"),
        (["--image", "keep_ratio"], "give keep_tokens; keep_ratio is damaged"),
    ],
)
def test_what_a_user_typed_as_a_value_is_no_flag(arguments, sentence, capsys):
    parser = build_parser()
    with pytest.raises(SystemExit), in_one_sentence(parser):
        parser.parse_args([*arguments, "-p", "hi", "--keep-tokens", "2"])
        raise UserError(sentence)
    translated = sentence.replace("keep_tokens", "--keep-tokens")
    assert capsys.readouterr().err == f"error: {translated}\n"


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"temperature": -1}, "temperature is -1; it must be 0 or more"),
        ({"seed": -1}, "seed is -1; "),
        ({"max_tokens": 0}, "max_tokens is 0; "),
        ({"top_p": 2}, "top_p is 2; "),
        ({"positions": "shuffle"}, "positions is 'shuffle'; it is keep or renumber"),
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0; "),
        ({"num_draft_tokens": 2, "temperature": 0.5}, "num_draft_tokens is for greedy answers"),
    ],
)
def test_an_error_in_python_names_the_parameter(options, start):
    with pytest.raises(UserError) as refused:
        generate(None, None, "Is there a red star?", **options)
    assert str(refused.value).startswith(start) and "--" not in str(refused.value)


SPEAK_FLAGS = (
    "generate.py", "evaluate.py", "explore.py", "sweep.py", "advise.py", "__main__.py",
    "command_budget.py",
)  # fmt: skip  # the commands


@pytest.mark.parametrize("package", ["mlx_vlm_prune", "convert"])
def test_the_errors_of_the_library_name_no_flags(package):
    flagged = []
    for file in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for call in ast.walk(tree) if file.name not in SPEAK_FLAGS else ():
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "UserError":
                text = ast.unparse(call)
                # The whole of another command may be advice.
                if re.search(r"--[a-z]", text) and not re.search("python -m|mlx-vlm-prune ", text):
                    flagged.append(f"{file.relative_to(ROOT)}:{call.lineno}")
    assert not flagged and "--" not in TOKENIZER_ADVICE


MISTAKES = {
    "mlx_vlm_prune.generate": (["--temp", "-1"], "--temp is -1.0; it must be 0 or more"),
    "mlx_vlm_prune.evaluate": (["--keep-ratio", "1.5"], "--keep-ratio is 1.5; "),
    "mlx_vlm_prune.sweep": (["--keep-ratio", "1.5"], "--keep-ratio is 1.5; "),
    "mlx_vlm_prune.plot": (["a.json"], "cannot read a.json: "),
    "convert": (
        ["prune-into", "a", "b", "--pruner", "norm", "--keep-ratio", "0"],
        "there is no folder a",
    ),
}


@pytest.mark.parametrize("module", MISTAKES)
def test_a_command_refuses_in_its_own_words(module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, start = MISTAKES[module]
    with pytest.raises(SystemExit) as stop:
        command(module)(arguments)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"error: {start}")


SEVERAL_METHODS = {
    "evaluate": evaluate.build_parser,
    "encode": encode.build_parser,
    "sweep": partial(arguments.build_sweep_parser, (), ()),
    "explore": partial(arguments.build_explore_parser, (), ()),
}


@pytest.mark.parametrize("command", SEVERAL_METHODS)
def test_several_methods_and_budgets_are_given_at_once_or_one_by_one(command):
    parser = SEVERAL_METHODS[command]()
    at_once = ["--pruner", "norm", "tome", "--keep-tokens", "9", "5"]
    by_turns = ["--pruner", "norm", "--keep-tokens", "9", "--pruner", "tome", "--keep-tokens", "5"]
    for argv in (at_once, by_turns):
        args = parser.parse_args(argv)
        assert (args.pruner, args.keep_tokens) == (["norm", "tome"], [9, 5])


@pytest.mark.parametrize("command", ["generate", "explore", "sweep", "chat", "advise"])
def test_an_image_that_is_absent_is_named_before_a_model_is_looked_for(command, capsys):
    module = importlib.import_module(f"mlx_vlm_prune.{command}")
    prompt = [] if command in ("chat", "advise") else ["--prompt", "x"]
    with pytest.raises(SystemExit) as stop:
        module.main(["--model", "nobody/none", "--image", "nowhere.png", *prompt])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: there is no image file nowhere.png\n"
