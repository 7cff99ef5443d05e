"""The weights of learned methods that lie beside a model, in FOLDER/pruners.safetensors.

Tensors are named METHOD.parameter. They were trained for the model that they lie beside.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from convert.checkpoint import LEARNED
from convert.errors import UserError
from convert.files import check_safetensors

from .pruners import METHODS


def read_learned(folder: Path, dims: int) -> dict[str, Any]:
    """Modules by the names of their methods, for features of `dims`; none without the file.

    Raises UserError for a file that is not sound, an unknown method, or a tensor that is
    missing, superfluous or misshapen.
    """
    file = folder / LEARNED
    if not file.exists():
        return {}
    check_safetensors(file)  # mx.load accepts what the format forbids
    held = mx.load(str(file))
    assert isinstance(held, dict)
    found: dict[str, dict[str, mx.array]] = {}
    for key, array in held.items():
        name, _, parameter = key.partition(".")
        if not getattr(METHODS.get(name), "learned", False):
            raise UserError(f"{file}: tensor {key} belongs to no learned method")
        found.setdefault(name, {})[parameter] = array
    return {name: _module(file, name, weights, dims) for name, weights in found.items()}


def _module(file: Path, name: str, weights: dict[str, mx.array], dims: int) -> Any:
    queries = weights.get("queries")
    module = METHODS[name].make(dims, 1 if queries is None or not queries.size else len(queries))
    own: Any = tree_flatten(module.parameters())
    wanted = {key: array.shape for key, array in own}
    for key in wanted | weights:
        shape = weights[key].shape if key in weights else None
        if shape != wanted.get(key):
            raise UserError(f"{file}: {name}.{key} is {shape}, not {wanted.get(key)}")
    module.load_weights([(key, array.astype(mx.float32)) for key, array in weights.items()])
    module.eval()
    return module
