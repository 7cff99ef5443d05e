"""Twins of methods of the user's own: my_method_torch.py beside my_method.py."""

from pathlib import Path

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.user_module import (
    SUFFIX,
    file_digests,
    load_user_module,
    name_files,
    remember_file,
)

from . import METHODS, STAGES


def register_twins(spec: str) -> str:
    """A specification with names in place of files, whose twins are in the table then.

    Raises UserError for a file that has no twin, or whose twin is no method.
    """
    return name_files(spec, _registered)


def _registered(path: Path) -> str:
    twin = path.with_name(f"{path.stem}_torch{SUFFIX}")
    if not twin.is_file():
        raise UserError(f"{path.name} has no twin in PyTorch; write {twin.name} beside it")
    module = load_user_module(twin)
    stage = getattr(module, "stage", None)
    if stage not in STAGES:
        raise UserError(f"{twin.name} has stage {stage!r}; there are {', '.join(STAGES)}")
    if not callable(getattr(module, "prune", getattr(module, "make_weights", None))):
        raise UserError(f"{twin.name} has no prune(signals, K, *, options), nor make_weights")
    if path.stem in METHODS and path.stem not in file_digests():
        raise UserError(f"a pruner is called {path.stem} already; choose another name")
    METHODS[path.stem] = STAGES[stage][path.stem] = module
    remember_file(path, twin)  # a run goes on with the same two
    return path.stem
