"""Options of methods whose defaults differ by family, as the methods' authors have them there.

Methods' own defaults are those for LLaVA, and hold in every family that is not listed.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ...pruners import Pipeline, Pruner, plan
from ..host import Host

# A level of grey, where no processor is known: pixels divided by deviations of 0.5, as for SigLIP.
SIGLIP_LEVEL = {"docprune": {"level": 1 / 255 / 0.5}}
# By model_type, then by method.
PRUNER_DEFAULTS: dict[str, Mapping[str, Mapping[str, Any]]] = {
    **dict.fromkeys(("gemma3", "paligemma", "idefics3", "smolvlm"), SIGLIP_LEVEL),
    **dict.fromkeys(("qwen3_vl", "qwen3_5", "qwen3_5_moe"), SIGLIP_LEVEL),
    "internvl_chat": {"docprune": {"level": 1 / 255 / 0.225}},  # ImageNet's deviations
    "qwen2_vl": {
        # xuyang-liu16/V2Drop@219e03e: 3, 16 and 22 of the language model's 28 layers.
        "v2drop": {"first": 3 / 28, "second": 16 / 28, "third": 22 / 28},
    },
    "qwen2_5_vl": {
        # Danielement321/HiPrune@6e83a12: 16 of the tower's 32 layers, counted from one.
        "hiprune": {"object_layer": 15 / 32},
        # Ironieser/MMTok@d1522cd.
        "mmtok": {"sharp": 0.01},
    },
}


def plan_for_host(
    host: Host,
    spec: str | Pruner | Pipeline | None,
    untrained: Mapping[str, Any] = MappingProxyType({}),
) -> Pipeline:
    """A chain with the model's own learned weights, and with `untrained` ones, by method; None
    prunes nothing."""
    spec = "none" if spec is None else spec
    pipeline = plan(spec, {**host.learned, **untrained})
    return with_family_defaults(pipeline, host.kind, host.processor)


def with_family_defaults(pipeline: Pipeline, kind: str, processor: Any = None) -> Pipeline:
    """The methods with the defaults of a family, and a level of grey as the processor makes it;
    options that are given stay as they are."""
    defaults = PRUNER_DEFAULTS.get(kind, {})
    deviations = getattr(getattr(processor, "image_processor", None), "image_std", None)
    if deviations is not None:
        defaults = {**defaults, "docprune": {"level": 1 / 255 / float(np.mean(deviations))}}
    return pipeline.with_defaults(defaults)
