"""Start commands in new processes, as a user does, in a folder with files of the user's."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
USER_MODULES = ("convert", "torch_ref", "benchmarks", "tests", "prompt")
EXECUTED = "a file of the user was executed"

# Runs a module as `python -m` does, once for each list of arguments. Nothing of ours is imported
# before it, so that the BLAS is loaded in time only if the module does it.
RUN_MODULE = """
import io, json, runpy, sys
from contextlib import redirect_stderr, redirect_stdout
given = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(given["missing"]))  # as if they were not installed
outcomes = []
for arguments in given["runs"]:
    sys.argv, code = [given["module"], *arguments], 0
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_module(given["module"], run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code
    outcomes.append((code, out.getvalue(), err.getvalue()))
from mlx_vlm_prune.machine import blas
print(json.dumps({"outcomes": outcomes, "blas": blas.reason(), "modules": list(sys.modules)}))
"""


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit code, stdout and stderr."""

    code: Any
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The sentence on stderr, after a check that there is one alone, with exit code 2."""
        assert (self.code, self.out) == (2, ""), self
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        return self.err


@dataclass(frozen=True)
class Process:
    """Outcomes of a process's runs, the reason for its BLAS, and the modules it imported."""

    outcomes: list[Outcome]
    blas: str
    modules: list[str]


def start_python(
    folder: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in a folder; our packages are importable, as if installed."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def run(
    folder: Path, module: str, *runs: Sequence[str], missing: Sequence[str] = (), **environ: str
) -> Process:
    """Run a module as `python -m` does, several times in one process."""
    given = {"module": module, "runs": runs, "missing": missing}
    done = start_python(folder, "-c", RUN_MODULE, json.dumps(given), **environ)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    outcomes = [Outcome(*outcome) for outcome in report["outcomes"]]
    return Process(outcomes, report["blas"], report["modules"])


def write_user_files(folder: Path, module: str) -> Path:
    """Write Python files, named as our packages, that end whatever executes them.

    None has the name of the package to run: `python -m` would take that file, before anything of
    ours is read.
    """
    folder.mkdir()
    for name in USER_MODULES:
        if name != module.split(".")[0]:
            (folder / f"{name}.py").write_text(f"raise SystemExit({EXECUTED!r})\n")
    return folder


def modules(*packages: str) -> Iterator[tuple[str, bool]]:
    """Every module of packages, by the name for `python -m`, and whether it is a command."""
    for package in packages:
        for file in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            is_command = '\nif __name__ == "__main__":\n' in file.read_text(encoding="utf-8")
            yield name.removesuffix(".__init__").removesuffix(".__main__"), is_command
