"""Build the wheel as `python -m build` does, and install it where nothing but its needs are."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mlx_vlm_prune", "torch_ref", "convert")
BESIDE = ("tests", "benchmarks", "docs")  # that no distribution may hold


def wheel(folder: Path) -> Path:
    """The wheel, built in a folder from the source distribution, which lies beside it.

    It is built from a copy, since a build leaves files behind.
    """
    copy, out = folder / "copy", folder / "out"
    copy.mkdir()
    for file in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md"):
        if (ROOT / file).is_file():
            shutil.copy(ROOT / file, copy)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BESIDE:
        (copy / name).mkdir()
        shutil.copy(ROOT / "tests" / "__init__.py", copy / name / "test_beside.py")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def install(wheel: Path, folder: Path) -> Path:
    """The Python of a new environment with the wheel and what it requires, which is linked from
    this one: nothing is downloaded, and no other package is there."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    offline = ["--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    done = subprocess.run([*pip, *offline], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = next(folder.glob("lib/python*/site-packages"))
    (metadata,) = site.glob("*.dist-info")
    for needed in requirements(Distribution.at(metadata).requires or ()):
        for name in top_level(needed):
            if not (site / name).exists():
                (site / name).symlink_to(Path(str(needed.locate_file(name))))
    return python


def requirements(lines: Sequence[str]) -> Iterator[Distribution]:
    """What is required on this machine, and what that requires in turn."""
    queue, known = [(line, "") for line in lines], set()
    while queue:
        line, extra = queue.pop()
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        needed = distribution(requirement.name)
        for each in ("", *requirement.extras):
            if (requirement.name, each) not in known:
                known.add((requirement.name, each))
                queue += [(text, each) for text in needed.requires or ()]
        yield needed


def top_level(needed: Distribution) -> set[str]:
    """The files and folders of a distribution, as they lie in site-packages."""
    return {file.parts[0] for file in needed.files or ()} - {"..", "__pycache__"}


def run(
    python: Path, folder: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program of the new environment in a folder, where this repository is out of reach."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(
        [str(python.parent / arguments[0]), *arguments[1:]],
        cwd=folder, env=kept | environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
