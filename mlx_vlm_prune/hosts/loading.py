"""From a folder in mlx-vlm's layout to its own (model, processor).

Some checkpoints name code of their own, which mlx-vlm would run; here nothing from a folder is run.
"""

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints import llava
from ..checkpoints.elsewhere import RECORD
from ..checkpoints.errors import UserError
from ..checkpoints.files import read_json
from .families import FAMILIES, REFUSED

INSTALL = "install it with pip install 'mlx_vlm_prune[mlx-vlm]'"


def kind_of(folder: Path) -> str | None:
    """The model_type in a folder's config.json, if it is one that mlx-vlm runs for us.

    A LLaVA may be one for our own decoder: `checkpoints.llava.is_for_us` says which is whose.
    Raises UserError, with the reason, for a model that has no visual tokens to prune.
    """
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    kind = config.get("model_type")
    if isinstance(record := config.get(RECORD), dict):
        raise UserError(
            f"{folder} prunes by itself ({record.get('pruner')}), for mlx-vlm to run; here give the"
            " folder that it was made from, and --pruner"
        )
    if isinstance(kind, str) and kind in REFUSED:
        raise UserError(f"{folder} is a {kind} model: {REFUSED[kind]}")
    if not isinstance(kind, str) or kind not in FAMILIES:
        return None
    return None if llava.is_published(folder) and llava.is_for_us(folder) else kind


def load(folder: Path, kind: str, dtype: mx.Dtype | None) -> tuple[Any, Any]:
    """What mlx-vlm's own `load` returns, in another dtype if one is given.

    Raises UserError, in one sentence, for whatever cannot be loaded.
    """
    config = read_json(folder / "config.json")
    if code := config.get("model_file"):
        raise UserError(f"{folder} wants its own {code} to be run, and no code from a folder is")
    print(f"importing mlx-vlm for a {kind} model; this takes some seconds", file=sys.stderr)
    try:
        from mlx_vlm.utils import load as mlx_vlm_load
    except ImportError as problem:
        raise UserError(f"a {kind} model needs mlx-vlm: {INSTALL} ({problem})") from None
    try:
        model, processor = mlx_vlm_load(str(folder), trust_remote_code=False)
    except Exception as problem:  # mlx-vlm and transformers raise whatever comes
        reason = " ".join((str(problem).strip() or type(problem).__name__).split())
        raise UserError(f"mlx-vlm cannot load {folder}: {reason}") from problem
    if dtype is not None:
        model.set_dtype(dtype)
        mx.eval(model.parameters())
    return model, processor
