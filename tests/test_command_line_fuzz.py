"""Promises of any command line: an answer, or one sentence and exit code 2, and no file is left.

tests/command_fuzz.py makes them from the commands' own parsers; each process has limits of memory
and of time.
"""

import json

import pytest

from mlx_vlm_prune.__main__ import COMMANDS

from . import command_fuzz
from .entry_points import ROOT, start_python

COUNT = 250


@pytest.mark.parametrize("seed", [20, 2026])
def test_a_command_line_ends_in_an_answer_or_one_sentence(seed):
    done = start_python(ROOT, "-m", "tests.command_fuzz", str(seed), str(COUNT))
    assert done.returncode == 0, done.stderr[-2000:]
    *faults, ends = map(json.loads, done.stdout.splitlines())
    assert not faults, json.dumps(faults, indent=1)
    assert sum(ends.values()) == COUNT
    refused = sum(count for end, count in ends.items() if end.endswith(" 2"))
    assert 0.5 * COUNT < refused < COUNT


def test_every_command_is_among_them():
    modules = {name.removeprefix("mlx_vlm_prune.") for name in command_fuzz.COMMANDS}
    assert modules == {module or "convert.__main__" for module in COMMANDS.values()}
