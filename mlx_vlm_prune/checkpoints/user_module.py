"""A Python file of the user's, imported by its path. It runs: no path comes from a checkpoint."""

import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from .errors import UserError, reason

SUFFIX = ".py"
PARENT = "mlx_vlm_prune_own"  # in the names of such modules, so that they shadow no others


def name_files(spec: str, name_of: Callable[[Path], str]) -> str:
    """A specification, "NAME:option=value+NAME", with `name_of(path)` in place of each file."""
    parts = (part.partition(":") for part in spec.split("+"))
    return "+".join(
        (name_of(Path(place).expanduser().resolve()) if place.endswith(SUFFIX) else place) + rest
        for place, rest in ((place, colon + options) for place, colon, options in parts)
    )


def load_user_module(path: Path) -> ModuleType:
    """The module of a file, whose name is the file's without .py.

    Raises UserError, in one sentence, for a file that is not there or whose code fails.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if not path.stem.isidentifier():
        raise UserError(f"{path.name} cannot name a module; use letters, digits and _")
    name = f"{PARENT}.{path.stem}"
    spec = spec_from_file_location(name, path)
    assert spec and spec.loader
    earlier = sys.modules.get(name)
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as problem:
        del sys.modules[name]
        if earlier:
            sys.modules[name] = earlier
        raise UserError(f"{path} fails: {type(problem).__name__}: {reason(problem)}") from problem
    return module
