"""The contract, and every method in one table.

A new method is one file with `stage`, `needs` and `prune(signals, K, *, options)`,
its twin in torch_ref, and one line in `METHODS`. Between a tower's layers it also has
`cuts`, between the language model's `schedule`, which say where how many tokens stay.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ..checkpoints.errors import UserError
from . import (
    apet,
    attention_pool,
    avgpool,
    cdpruner,
    cls_attention,
    dart,
    divprune,
    downsample,
    fastv,
    global_local,
    hiprune,
    holov,
    kq_norm,
    mlp,
    mmtok,
    none,
    norm,
    pact,
    patch_norm,
    pixelprune,
    prumerge,
    prumerge_plus,
    pyramiddrop,
    random,
    received_attention,
    restore,
    scope,
    score_prune,
    similarity,
    sparsevlm,
    tome,
    twig,
    uniform,
    v2drop,
    visionzip,
    vispruner,
    vtw,
)  # fmt: skip
from .contract import Reduction, Signals, Stage
from .pipeline import Pipeline, Pruner
from .spec import parse

METHODS: dict[str, ModuleType] = {
    "none": none,
    "random": random,
    "uniform": uniform,
    "avgpool": avgpool,
    "downsample": downsample,
    "tome": tome,
    "patch_norm": patch_norm,
    "kq_norm": kq_norm,
    "pixelprune": pixelprune,
    "norm": norm,
    "similarity": similarity,
    "received_attention": received_attention,
    "cls_attention": cls_attention,
    "visionzip": visionzip,
    "vispruner": vispruner,
    "prumerge": prumerge,
    "prumerge_plus": prumerge_plus,
    "hiprune": hiprune,
    "holov": holov,
    "global_local": global_local,
    "divprune": divprune,
    "cdpruner": cdpruner,
    "scope": scope,
    "mmtok": mmtok,
    "apet": apet,
    "fastv": fastv,
    "pyramiddrop": pyramiddrop,
    "sparsevlm": sparsevlm,
    "dart": dart,
    "v2drop": v2drop,
    "vtw": vtw,
    "pact": pact,
    "attention_pool": attention_pool,
    "score_prune": score_prune,
    "mlp": mlp,
    "twig": twig,
    "restore": restore,
}
# Chains with a name. DUET-VLM merges like VisionZip, then drops inside the decoder at half
# depth and later; VScan selects and merges in the tower, then drops at half depth.
PRESETS = {
    "duet": "visionzip+pyramiddrop:start=0.5,stages=2",
    "vscan": "global_local+fastv:layer=0.5",
}

__all__ = [
    "METHODS", "PRESETS", "Pipeline", "Pruner", "Reduction", "Signals", "Stage", "plan", "resolve",
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
