"""Every source is valid in the oldest Python allowed, and every module can be imported without a
warning on the Python that runs the tests."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFIG = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("mlx_vlm_prune", "convert", "torch_ref", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
MODULES = [
    ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCES
    if path.parts[0] not in ("benchmarks", "tests") and path.stem != "__main__"
]


def oldest() -> tuple[int, int]:
    version = re.search(r'^requires-python = ">=(\d+)\.(\d+)"$', CONFIG, re.M)
    assert version
    return int(version[1]), int(version[2])


def test_the_linter_checks_for_the_oldest_python():
    major, minor = oldest()
    assert f'target-version = "py{major}{minor}"' in CONFIG


def test_every_source_is_written_in_the_oldest_python():
    for path in SOURCES:
        ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path), feature_version=oldest())


EXTRAS = {  # the package that a part needs
    "torch_ref": "torch", "mlx_vlm_prune.hosts": "mlx_vlm", "mlx_vlm_prune.serving": "fastapi",
    "mlx_vlm_prune.webui": "gradio", "mlx_vlm_prune.evaluation.harness": "lmms_eval",
}  # fmt: skip


@pytest.mark.parametrize("part", ["mlx_vlm_prune", "convert", *EXTRAS])
def test_every_module_can_be_imported(part):
    if part in EXTRAS:
        pytest.importorskip(EXTRAS[part], reason=f"{EXTRAS[part]} is not installed")
    other_parts = tuple(f"{other}." for other in EXTRAS if other != part)
    names = [name for name in MODULES if f"{name}.".startswith(f"{part}.")]
    assert names
    for name in names:
        if not name.startswith(other_parts):
            importlib.import_module(name)
