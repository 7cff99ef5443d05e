"""One file out of several modules: the functions that are used, each as it stands in its own.

So a pruned.py runs the very code that is tested here, and imports nothing of ours.
"""

import ast
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INTO = Path(__file__).resolve().parent
FIRST = "__all__", "KEEP_RATIO", "KEEP_TOKENS", "PRUNER", "OPTIONS"
STOCK = "llava", "qwen3_vl"  # the packages of mlx-vlm's that the modules here stand on


@dataclass(frozen=True)
class Module:
    """What a module defines and imports, by name."""

    lines: list[str]
    own: dict[str, ast.stmt]
    relative: dict[str, tuple[Path, str]]  # to a module of ours, and the name there
    absolute: dict[str, tuple[str, str | None, str]]  # (module, name, alias) of an import

    def text(self, name: str) -> str:
        node = self.own[name]
        above = getattr(node, "decorator_list", None)
        first = above[0].lineno if above else node.lineno
        return "\n".join(self.lines[first - 1 : node.end_lineno])


@cache
def module(file: Path) -> Module:
    """Read one, without importing it."""
    text = file.read_text(encoding="utf-8")
    found = Module(text.splitlines(), {}, {}, {})
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom):
            _note_from(found, file, node)
        elif isinstance(node, ast.Import):
            for each in node.names:
                alias = each.asname or each.name
                found.absolute[alias] = (each.name, None, alias)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.own[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            assert isinstance(target, ast.Name), f"{file}: {ast.unparse(node)}"
            found.own[target.id] = node
    return found


def _note_from(found: Module, file: Path, node: ast.ImportFrom) -> None:
    home = node.module or ""
    for each in node.names:
        alias = each.asname or each.name
        if node.level:
            there = file.parents[node.level - 1].joinpath(*home.split("."))
            found.relative[alias] = (there.with_suffix(".py"), each.name)
        else:
            found.absolute[alias] = (home, each.name, alias)


@dataclass
class Writer:
    """Gathers what an entry needs, and what that needs.

    `instead` puts a module in another's place, for all its names or for one; `values` are
    settings.
    """

    instead: Mapping[tuple[Path, str], Path]
    values: Mapping[str, str]
    family: str  # the package of mlx-vlm's
    parts: dict[str, tuple[Path, str]] = field(default_factory=dict)
    imports: set[tuple[str, str | None, str]] = field(default_factory=set)

    def gather(self, file: Path, name: str) -> None:
        """A name of a module, and after it all that it uses."""
        file = self.instead.get((file, name), self.instead.get((file, ""), file))
        here = module(file)
        if name in here.relative:
            there, original = here.relative[name]
            assert original == name, f"{file}: {name} has another name where it comes from"
            self.gather(there, name)
        elif name in here.absolute:
            self.imports.add(self._stocked(here.absolute[name]))
        elif name in here.own:
            self._define(file, here, name)

    def _define(self, file: Path, here: Module, name: str) -> None:
        if name in self.parts:
            assert self.parts[name][0] == file, f"{name} is in {file} and {self.parts[name][0]}"
            return
        text = here.text(name)
        if name in self.values:
            told, _, after = text.partition(" = ")
            _, mark, comment = after.partition("  #")
            text = f"{told} = {self.values[name]}{mark}{comment}"
        self.parts[name] = (file, text)
        for node in ast.walk(here.own[name]):
            if isinstance(node, ast.Name) and node.id != name:
                self.gather(file, node.id)
            elif name == "__all__" and isinstance(node, ast.Constant):
                self.gather(file, str(node.value))

    def _stocked(self, told: tuple[str, str | None, str]) -> tuple[str, str | None, str]:
        """mlx-vlm's package of the family, in place of the one that stands for all."""
        home, name, alias = told
        if alias == "stock":
            return home, self.family, alias
        if home in {f"mlx_vlm.models.{one}" for one in STOCK}:
            return f"mlx_vlm.models.{self.family}", name, alias
        return told

    def written(self, entry: Path, docstring: str) -> str:
        """The file: docstring, imports, settings, classes, and functions as they come into use."""
        for name in module(entry).own:
            self.gather(entry, name)
        texts = [text for _, text in self.parts.values()]
        functions = [text for text in texts if text.startswith("def ")]
        classes = [text for text in texts if text.startswith(("@", "class "))]
        classes.sort(key=lambda text: text.startswith("class "))  # annotations name the others
        settings = [text for text in texts if text not in functions and text not in classes]
        settings.sort(key=_rank)
        top = [f'"""{docstring}\n"""', imported(self.imports), "\n".join(settings)]
        return "\n\n\n".join(["\n\n".join(top), *classes, *functions]) + "\n"


def _rank(text: str) -> int:
    """What a reader may want to change comes first."""
    firsts = [i for i, name in enumerate(FIRST) if text.startswith(name)]
    return firsts[0] if firsts else len(FIRST)


def imported(wanted: set[tuple[str, str | None, str]]) -> str:
    """Import statements, in the order that ruff wants."""
    groups: dict[bool, list[str]] = {True: [], False: []}
    for home, _, alias in sorted((w for w in wanted if w[1] is None), key=str):
        own = f"import {home}" + (f" as {alias}" if alias != home else "")
        groups[home.split(".")[0] in sys.stdlib_module_names].append(own)
    homes = sorted({home for home, name, _ in wanted if name is not None})
    for home in homes:
        names = [(n, a) for h, n, a in wanted if h == home and n is not None]
        told = [n if n == a else f"{n} as {a}" for n, a in sorted(names, key=_by_kind)]
        line = f"from {home} import {', '.join(told)}"
        if len(line) > 100:
            line = f"from {home} import (\n" + "".join(f"    {one},\n" for one in told) + ")"
        groups[home.split(".")[0] in sys.stdlib_module_names].append(line)
    return "\n\n".join("\n".join(group) for group in (groups[True], groups[False]) if group)


def _by_kind(told: tuple[str, str]) -> tuple[bool, bool, str]:
    """Constants, then classes, then functions."""
    name = told[0]
    return not name.isupper(), name[:1].islower(), name.lower()
