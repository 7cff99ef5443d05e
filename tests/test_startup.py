"""Promises of signals before a command has begun: Ctrl-C during imports leaves no traceback."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mlx_vlm_prune.checkpoints import startup
from mlx_vlm_prune.serving.listening import expect_sigterm

from .entry_points import ROOT, start_python

# Starts a module as `python -m` does, and presses Ctrl-C when another is about to be imported.
INTERRUPT = """
import os, runpy, signal, sys
_, module, late, *arguments = sys.argv
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == late:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv, sys.orig_argv = ["-m", *arguments], [sys.executable, "-m", module]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
STARTS = [  # a command, and a module that it imports
    ("convert", "convert.describe"),
    ("convert", "mlx_vlm_prune.checkpoints.version"),
    ("mlx_vlm_prune", "mlx_vlm_prune.machine.blas"),
    ("mlx_vlm_prune", "mlx.core"),
    ("mlx_vlm_prune.generate", "numpy"),
    ("mlx_vlm_prune.train", "mlx_vlm_prune.training.options"),
    ("mlx_vlm_prune.evaluate", "mlx_vlm_prune.evaluation.table"),
    ("torch_ref.verify", "torch"),
    ("benchmarks.speed", "benchmarks.timing"),
]


@pytest.mark.parametrize(("module", "late"), STARTS)
def test_ctrl_c_during_imports_ends_in_no_traceback(module, late, tmp_path):
    arguments = ["generate"] if module == "mlx_vlm_prune" else []
    done = start_python(tmp_path, "-c", INTERRUPT, module, late, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_command_is_known_by_how_python_starts_it(tmp_path):
    """`python -m` calls itself "-m" while it imports the package of a command."""
    code = "import sys; from mlx_vlm_prune.checkpoints.startup import _end; import signal\n"
    code += "print(sys.argv[0], signal.getsignal(signal.SIGINT) is _end)"
    (tmp_path / "mine.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "mine"], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.endswith("mine.py False\n"), done


@pytest.mark.parametrize("name", ["-m", "bin/mlx-vlm-prune", "bin/mlx_vlm_prune.generate"])
def test_the_handler_is_there_until_the_options_are_parsed(name, monkeypatch):
    monkeypatch.setattr("sys.argv", [name])
    monkeypatch.setattr("sys.orig_argv", ["python", "-X", "dev", "-m", "mlx_vlm_prune.train"])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    startup.watch_start()
    assert signal.getsignal(signal.SIGINT) is startup._end
    startup.end_watch()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_program_of_the_users_keeps_its_own_handler(monkeypatch):
    monkeypatch.setattr("sys.argv", ["mine.py"])
    startup.watch_start()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr("sys.argv", ["-m"])
    for start in (["-m", "theirs.tool"], ["-mtheirs.tool"], ["-m", "theirs", "mlx_vlm_prune"]):
        monkeypatch.setattr("sys.orig_argv", ["python", *start])
        startup.watch_start()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr("sys.orig_argv", ["python", "-mmlx_vlm_prune.train"])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        startup.watch_start()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_before_a_server_waits_for_it_is_not_lost():
    before, server, ended = signal.getsignal(signal.SIGTERM), SimpleNamespace(should_exit=False), []
    expect_sigterm(server, lambda: ended.append("early"))
    try:
        signal.raise_signal(signal.SIGTERM)
        assert ended == ["early"]
        server.should_exit = True  # as uvicorn says once it has the signal
        signal.raise_signal(signal.SIGTERM)
        assert ended == ["early"]
    finally:
        signal.signal(signal.SIGTERM, before)
