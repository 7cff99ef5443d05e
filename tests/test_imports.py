"""Imports point one way: from a part to one below it, never up, and files never in a ring."""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the top to the bottom. A part imports those that stand after it; commands import all.
PARTS = {
    "mlx_vlm_prune": (
        "webui", "serving", "training", "plots", "evaluation", "planning", "hosts", "generation",
        "models", "pruners", "inputs", "scenes", "machine", "checkpoints",
    ),
    "torch_ref": ("training", "generation", "models", "pruners"),
}  # fmt: skip
Graph = Mapping[str, set[str]]


def modules(root: Path, package: str) -> dict[str, Path]:
    """Every file of a package by its dotted name."""
    files = {}
    for file in sorted((root / package).rglob("*.py")):
        names = file.relative_to(root).with_suffix("").parts
        files[".".join(names[:-1] if names[-1] == "__init__" else names)] = file
    return files


def imported_names(name: str, file: Path) -> Iterator[str]:
    """The absolute names that a file imports at run time, in functions too."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in runtime_nodes(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, node.module] if node.module else base
            yield from (".".join([*base, alias.name]) for alias in node.names)


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """A node and its descendants, without blocks under `if TYPE_CHECKING`."""
    yield node
    if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        for child in ast.iter_child_nodes(node):
            yield from runtime_nodes(child)


def import_graph(root: Path, package: str) -> Graph:
    """Which files of a package each of its files imports."""
    files = modules(root, package)
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, file in files.items():
        for target in imported_names(name, file):
            home = target if target in files else target.rpartition(".")[0]
            graph[name] |= {home} & files.keys() - {name}
    return graph


def upward(graph: Graph, package: str) -> list[str]:
    """Imports of a part that stands above the importer, as 'file imports file'."""
    order = PARTS[package]

    def height(module: str) -> int:
        part = module.split(".")[1:2]
        return order.index(part[0]) if part and part[0] in order else -1  # a command, on top

    return [f"{a} imports {b}" for a in graph for b in sorted(graph[a]) if height(b) < height(a)]


def ring(graph: Graph) -> list[str]:
    """The files in rings: what remains after removing, again and again, files without imports."""
    remaining = {name: set(targets) for name, targets in graph.items()}
    while leaves := {name for name, targets in remaining.items() if not targets}:
        remaining = {
            name: targets - leaves for name, targets in remaining.items() if name not in leaves
        }
    return sorted(remaining)


@pytest.mark.parametrize("package", PARTS)
def test_the_parts_are_the_folders(package):
    folders = {p.name for p in (ROOT / package).iterdir() if (p / "__init__.py").is_file()}
    assert folders == set(PARTS[package])


@pytest.mark.parametrize("package", PARTS)
def test_no_import_points_up(package):
    assert not upward(import_graph(ROOT, package), package)


@pytest.mark.parametrize("package", [*PARTS, "convert", "benchmarks"])
def test_no_files_import_each_other_in_a_ring(package):
    graph = import_graph(ROOT, package)
    assert len(graph) > 5 and any(graph.values())
    assert not ring(graph)


def test_an_upward_import_and_a_ring_are_seen(tmp_path):
    files = {
        "__init__.py": "",
        "hosts/__init__.py": "",
        "hosts/prompt.py": "from ..generation import steps",
        "generation/__init__.py": "",
        "generation/steps.py": "def late():\n    from ..hosts.prompt import prune",
        "generation/result.py": "from . import overlay",
        "generation/overlay.py": "from mlx_vlm_prune.generation.result import Result",
    }
    for name, text in files.items():
        file = tmp_path / "mlx_vlm_prune" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    graph = import_graph(tmp_path, "mlx_vlm_prune")
    arrow = "mlx_vlm_prune.generation.steps imports mlx_vlm_prune.hosts.prompt"
    assert upward(graph, "mlx_vlm_prune") == [arrow]
    assert [name.rpartition(".")[2] for name in ring(graph)] == [
        "overlay", "result", "steps", "prompt",
    ]  # fmt: skip


def test_what_only_a_type_checker_reads_is_no_import(tmp_path):
    (tmp_path / "torch_ref/pruners").mkdir(parents=True)
    lines = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..models import vlm\n"
    (tmp_path / "torch_ref/pruners/norm.py").write_text(lines)
    (tmp_path / "torch_ref/models").mkdir()
    (tmp_path / "torch_ref/models/vlm.py").write_text("from ..pruners import norm")
    graph = import_graph(tmp_path, "torch_ref")
    assert not upward(graph, "torch_ref") and not ring(graph)


def test_the_tree_in_the_design_is_the_repository():
    """Every folder with code stands there, and nothing else does."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    shown, above = set(), []
    for line in text.split("```\n")[1].splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        above = [*above[: indent // 2], name]
        shown.add("".join(above))
    folders = {
        f"{folder.relative_to(ROOT)}/"
        for package in (*PARTS, "convert", "benchmarks", "tests")
        for folder in [ROOT / package, *(ROOT / package).rglob("*")]
        if any(folder.glob("*.py"))
    }
    twins = {f for f in folders if f.startswith("torch_ref/") and f.count("/") > 2}
    assert {path for path in shown if path.endswith("/")} == folders - twins
    commands = {f"mlx_vlm_prune/{file.name}" for file in (ROOT / "mlx_vlm_prune").glob("*.py")}
    models = {f"mlx_vlm_prune/models/{file.name}" for file in modules_of("models")}
    assert {path for path in shown if path.endswith(".py")} == commands | models


def modules_of(part: str) -> list[Path]:
    files = (ROOT / "mlx_vlm_prune" / part).glob("*.py")
    return [file for file in files if file.name != "__init__.py"]


def test_every_file_that_the_design_names_exists():
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+/[\w/]+\.py)`", text))
    assert len(named) > 20
    homes = (ROOT, ROOT / "mlx_vlm_prune")
    assert not [name for name in named if not any((home / name).is_file() for home in homes)]
