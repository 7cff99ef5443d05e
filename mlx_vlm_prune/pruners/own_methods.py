"""Methods of the user's own, from files on the command line.

`--pruner ./my_method.py:step=2` is the method of that file, which gets the file's name. A file is
run only where a user types it: neither a checkpoint nor a request to a server can name one.
"""

import argparse
from hashlib import sha256
from pathlib import Path

from ..checkpoints.errors import UserError
from ..checkpoints.user_module import load_user_module
from . import register_pruner

SUFFIX = ".py"
_paths: dict[str, Path] = {}  # of the methods that came from files, by name


def method_spec(text: str) -> str:
    """The type of the option --pruner: a specification, with names in place of files."""
    try:
        return register_files(text)
    except UserError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def register_files(spec: str) -> str:
    """A specification with names in place of files, whose methods are in the table then.

    Raises UserError for a file that is no method.
    """
    return "+".join(_registered(part) for part in spec.split("+"))


def _registered(part: str) -> str:
    place, colon, options = part.partition(":")
    if not place.endswith(SUFFIX):
        return part
    path = Path(place).expanduser().resolve()
    if _paths.get(path.stem) != path:
        register_pruner(load_user_module(path))
        _paths[path.stem] = path
    return path.stem + colon + options


def with_files(spec: str) -> str:
    """The specification again as it can be typed: with files in place of their methods' names."""
    parts = (part.partition(":") for part in spec.split("+"))
    return "+".join(str(_paths.get(name, name)) + colon + rest for name, colon, rest in parts)


def file_digests() -> dict[str, str]:
    """Of each method that came from a file, by name, the SHA-256 of what the file holds now."""
    return {name: sha256(path.read_bytes()).hexdigest() for name, path in _paths.items()}
