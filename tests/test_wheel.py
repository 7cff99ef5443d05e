"""Promises of the wheel and of the source distribution: they hold what they must, nothing else,
and the wheel runs outside of the checkout with nothing but what it requires.
"""

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from mlx_vlm_prune.machine import blas

from . import distributions
from .distributions import PACKAGES, ROOT

pytest.importorskip("build", reason="build is not installed: pip install build")
# Of the source distribution, beside the packages.
MUST, MAY = {"pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"}, {"CHANGELOG.md"}
WRITTEN = {"PKG-INFO", "setup.cfg"}  # by setuptools
# Every command of one process: its arguments, and a file that it writes.
COMMANDS = {
    "advise": ["--json", "advice.json"],
    "explore": ["--pruner", "norm", "--keep-ratio", "0.5", "--max-tokens", "2", "--no-predict",
                "--out", "why.html"],
    "evaluate": "--per-kind 1 --pruner uniform --keep-tokens 49 --out e.json".split(),
    "convert": ["to-mlx", "{checkpoint}", "four-bits", "-q", "--q-bits", "4"],
}  # fmt: skip
EVERY = """
import json, sys
from mlx_vlm_prune.__main__ import main
from mlx_vlm_prune.scenes import CHECKPOINT
for command, arguments in json.loads(sys.argv[1]).items():
    main([command, *(word.format(checkpoint=CHECKPOINT) for word in arguments)])
absent = [name for name in ("torch", "mlx_lm", "mlx_vlm", "benchmarks") if name in sys.modules]
assert not absent, absent
print(sys.modules["mlx_vlm_prune"].__file__)
"""


def files(folder: Path) -> set[str]:
    """Every file of the packages, but what Python keeps of them."""
    return {
        str(path.relative_to(folder))
        for package in PACKAGES
        for path in (folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return distributions.wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as content:
        return set(content.namelist())


def test_every_module_and_what_it_reads_are_in_the_wheel(names):
    expected = files(ROOT)
    assert expected <= names
    model = {name for name in expected if name.startswith("mlx_vlm_prune/scenes/checkpoint/")}
    assert {Path(name).suffix for name in model} == {".json", ".safetensors"}
    data = {"scenes/pages/fonts": "ttf txt", "generation/explorer": "js css html"}
    for folder, kinds in data.items():
        read = {name for name in names if name.startswith(f"mlx_vlm_prune/{folder}/")}
        assert {Path(name).suffix[1:] for name in read} == set(kinds.split())
    assert "mlx_vlm_prune/py.typed" in names


def test_nothing_else_is(names):
    assert not {name for name in names - files(ROOT) if ".dist-info/" not in name}


def test_the_licence_of_everything_in_it_lies_with_its_metadata(names):
    licences = {name.partition("/licenses/")[2] for name in names if "/licenses/" in name}
    fonts = {str(path.relative_to(ROOT)) for path in ROOT.glob("mlx_vlm_prune/**/LICENSE-*.txt")}
    assert licences == {"LICENSE", *fonts} and len(fonts) == 2


def test_the_source_distribution_has_what_builds_the_wheel_and_no_more(wheel):
    """The wheel was built from it."""
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as content:
        members = {m.name.partition("/")[2] for m in content.getmembers() if m.isfile()}
    rest = members - files(ROOT)
    assert files(ROOT) <= members and rest >= MUST
    others = {name for name in rest if not name.startswith("mlx_vlm_prune.egg-info/")}
    assert others <= MUST | MAY | WRITTEN


def test_twine_would_upload_both(wheel):
    pytest.importorskip("twine", reason="twine is not installed: pip install twine")
    both = [str(path) for path in wheel.parent.iterdir()]
    command = [sys.executable, "-m", "twine", "check", "--strict", *both]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("PASSED"), len(both)) == (0, 2, 2), done.stdout


def fast_blas() -> dict[str, str]:
    """This environment's BLAS by its path, where there is one: what MLX brings on Linux is slow,
    and the new environment has no other."""
    files = [name for name in blas._candidates() if Path(name).is_file()]
    return {blas.SWITCH: files[0]} if files and sys.platform == "linux" else {}


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    return distributions.install(wheel, tmp_path_factory.mktemp("installed") / "environment")


def test_the_demo_answers(python, tmp_path):
    done = distributions.run(python, tmp_path, "mlx-vlm-prune", "generate", "--json", "a.json",
                             **fast_blas())  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "a.json").read_text())
    assert answer["visual_tokens_kept"] < answer["visual_tokens"] == 196


def test_advise_explore_evaluate_and_convert_run(python, tmp_path):
    quick = {"MLX_VLM_PRUNE_CALIBRATION_SECONDS": "0.1", **fast_blas()}
    quick["MLX_VLM_PRUNE_CACHE"] = str(tmp_path / "cache")
    done = distributions.run(python, tmp_path, "python", "-c", EVERY, json.dumps(COMMANDS), **quick)
    assert done.returncode == 0, done.stderr
    assert str(python.parents[1]) in done.stdout.splitlines()[-1]
    for name in ("advice.json", "why.html", "e.json", "four-bits/model.safetensors"):
        assert (tmp_path / name).stat().st_size > 0, name


def test_bench_says_that_it_needs_a_clone(python, tmp_path):
    done = distributions.run(python, tmp_path, "mlx-vlm-prune", "bench", "device", "--quick")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "benchmarks are not installed" in done.stderr and "clone" in done.stderr
