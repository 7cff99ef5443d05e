"""Promises of the wheel: it holds every file of the packages, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mlx_vlm_prune", "torch_ref", "convert")
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('out'))"


def files(folder: Path) -> set[str]:
    """Every file of the packages, but what Python keeps of them."""
    return {
        str(path.relative_to(folder))
        for package in PACKAGES
        for path in (folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What lies in a wheel that is built from a copy, since a build leaves files behind."""
    copy = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in (*PACKAGES, "tests", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next((copy / "out").glob("*.whl"))) as wheel:
        return set(wheel.namelist())


def test_every_module_and_the_built_in_model_are_in_the_wheel(names):
    expected = files(ROOT)
    assert expected <= names
    model = {name for name in expected if name.startswith("mlx_vlm_prune/scenes/checkpoint/")}
    assert {Path(name).suffix for name in model} == {".json", ".safetensors"}


def test_nothing_else_is(names):
    assert not {name for name in names - files(ROOT) if ".dist-info/" not in name}
