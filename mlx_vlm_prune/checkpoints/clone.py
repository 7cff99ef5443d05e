"""Packages that lie beside this one: the converter everywhere, the benchmarks in a clone.

`import convert` would take, and execute, a convert.py in the user's folder before it.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

HOME = Path(__file__).parents[2]


def is_clone() -> bool:
    """Does this package lie in a clone of its repository, not among others' packages?"""
    project = HOME / "pyproject.toml"
    return project.is_file() and '\nname = "mlx_vlm_prune"\n' in project.read_text(encoding="utf-8")


def package_beside(name: str) -> ModuleType | None:
    """The package of that name beside this one, imported; None where there is none."""
    spec = PathFinder.find_spec(name, [str(HOME)])
    if spec is None or spec.loader is None:
        return None
    present = sys.modules.get(name)
    if present is not None and getattr(present, "__file__", None) == spec.origin:
        return present
    sys.modules[name] = package = module_from_spec(spec)
    spec.loader.exec_module(package)
    return package
