"""Methods of the user's own, from files on the command line.

`--pruner ./my_method.py:step=2` is the method of that file, which gets the file's name. A file is
run only where a user types it: neither a checkpoint nor a request to a server can name one.
"""

import argparse
from pathlib import Path

from ..checkpoints.errors import UserError
from ..checkpoints.user_module import (
    file_digests,
    is_remembered,
    load_user_module,
    name_files,
    remember_file,
)
from . import METHODS, check_names, register_pruner

SIGNS = "+:"  # of chains and options


def method_spec(text: str) -> str:
    """The type of the option --pruner: a specification, with names in place of files.

    An unknown name is refused here, before a model is loaded.
    """
    try:
        spec = register_files(text)
        check_names([spec])
        return spec
    except UserError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def register_files(spec: str) -> str:
    """A specification with names in place of files, whose methods are in the table then.

    Raises UserError for a file that is no method.
    """
    if Path(spec).is_file() and set(spec) & set(SIGNS):
        raise UserError(
            f"{spec}: a place with {' or '.join(SIGNS)} in it reads as a chain; move it"
        )
    return name_files(spec, _registered)


def _registered(path: Path) -> str:
    if path.stem not in METHODS or not is_remembered(path):
        method = load_user_module(path)
        if path.stem in file_digests():
            METHODS.pop(path.stem, None)  # an earlier version, or another file of this name
        register_pruner(method)
        remember_file(path)
    return path.stem
