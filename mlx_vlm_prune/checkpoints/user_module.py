"""A Python file of the user's, imported by its path. It runs: no path comes from a checkpoint."""

import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from .errors import UserError, reason

SUFFIX = ".py"
PARENT = "mlx_vlm_prune_own"  # in the names of such modules, so that they shadow no others
# By name: the file, and the SHA-256 of it and of what was run with it.
_files: dict[str, tuple[Path, str]] = {}


def name_files(spec: str, name_of: Callable[[Path], str]) -> str:
    """A specification, "NAME:option=value+NAME", with `name_of(path)` in place of each file."""
    parts = (part.partition(":") for part in spec.split("+"))
    return "+".join(
        (name_of(Path(place).expanduser().resolve()) if place.endswith(SUFFIX) else place) + rest
        for place, rest in ((place, colon + options) for place, colon, options in parts)
    )


def is_remembered(path: Path) -> bool:
    """Was this very content run before, from this place?"""
    return _files.get(path.stem) == (path, _digest(path))


def remember_file(path: Path, *beside: Path) -> None:
    """Note that a file was run, as it is now, or one or more that lie beside it."""
    _files[path.stem] = (path, _digest(path, *beside))


def _digest(*paths: Path) -> str:
    return sha256(b"".join(p.read_bytes() for p in paths if p.is_file())).hexdigest()


def with_files(spec: str) -> str:
    """The specification again as it can be typed: with files in place of their names."""
    parts = (part.partition(":") for part in spec.split("+"))
    names = ((str(_files[name][0]) if name in _files else name, *rest) for name, *rest in parts)
    return "+".join("".join(name) for name in names)


def file_digests(spec: str = "") -> dict[str, str]:
    """Of each name that came from a file the SHA-256 of what was run; of those in a specification,
    if there is one."""
    names = {part.partition(":")[0] for part in spec.split("+")} if spec else _files.keys()
    return {name: digest for name, (_, digest) in _files.items() if name in names}


def unknown_weights(names: Sequence[str]) -> str:
    """What to say of learned weights whose methods are not there."""
    named = " and ".join(names)
    return f"no method is called {named}, so its weights are left out; --pruner FILE.py names one"


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
