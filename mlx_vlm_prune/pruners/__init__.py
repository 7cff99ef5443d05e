"""The contract, and every method in one table.

A new method is one file with `stage`, `needs` (the signals beside the tokens, if any) and
`prune(signals, K, *, options)`, its twin in torch_ref, and its name in `NAMES`. Between a
tower's layers it also has `cuts`, between the language model's `schedule`, which say where how
many tokens stay; what else a file may say is in `method.py`.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ..checkpoints.errors import UserError
from .contract import Reduction, Signals, Stage
from .method import Method
from .pipeline import Pipeline, Pruner, StepBudgets
from .spec import parse

# In the order in which they are listed.
NAMES = """
    none random uniform avgpool downsample tome patch_norm kq_norm pixelprune norm
    similarity received_attention cls_attention visionzip vispruner prumerge prumerge_plus
    hiprune holov global_local divprune cdpruner scope mmtok apet fastv pyramiddrop
    sparsevlm dart v2drop vtw pact attention_pool score_prune mlp twig restore
""".split()
METHODS = {name: Method.of(import_module(f".{name}", __name__)) for name in NAMES}
# Chains with a name. DUET-VLM merges like VisionZip, then drops inside the decoder at half
# depth and later; VScan selects and merges in the tower, then drops at half depth.
PRESETS = {
    "duet": "visionzip+pyramiddrop:start=0.5,stages=2",
    "vscan": "global_local+fastv:layer=0.5",
}

__all__ = [
    "METHODS", "PRESETS", "Method", "Pipeline", "Pruner", "Reduction", "Signals", "Stage",
    "StepBudgets", "plan", "resolve",
]  # fmt: skip


def plan(spec: "str | Pruner | Pipeline", learned: Mapping[str, Any] | None = None) -> Pipeline:
    """The methods that "NAME", "NAME:option=value,…" or "NAME+NAME" names.

    `learned` holds the weights that the checkpoint has of learned methods, by name.
    Raises UserError for what cannot be.
    """
    if isinstance(spec, str):
        return parse(spec, METHODS, PRESETS, learned or {})
    if not isinstance(spec, Pruner | Pipeline):
        raise UserError(f"pruner is {spec!r}; it must be a name, such as 'divprune'")
    return Pipeline.of(spec)


def resolve(spec: "str | Pruner", learned: Mapping[str, Any] | None = None) -> Pruner:
    """The one method that a specification without a chain names."""
    if isinstance(spec, Pruner):
        return spec
    (pruner,) = plan(spec, learned).steps
    return pruner
