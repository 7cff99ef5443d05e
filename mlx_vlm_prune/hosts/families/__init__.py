"""The families of mlx-vlm's models, one a file: tower, projector, prompt. Add families here.

To add one: its file, a line here, and a tiny model in the tests.
"""

from typing import Any

from ...checkpoints.errors import UserError
from ..host import Host
from .fastvlm import FastVLMHost
from .gemma3 import Gemma3Host
from .gemma4 import Gemma4Host
from .idefics3 import Idefics3Host
from .internvl_chat import InternVLHost
from .lfm2_vl import Lfm2VLHost
from .llava import LlavaHost
from .llava_next import LlavaNextHost
from .llava_onevision import LlavaOnevisionHost
from .paligemma import PaliGemmaHost
from .pixtral import PixtralHost
from .qwen2_5_vl import Qwen2_5VLHost
from .qwen2_vl import Qwen2VLHost
from .qwen3_5 import Qwen3_5Host
from .qwen3_vl import Qwen3VLHost

FAMILIES: dict[str, type[Host]] = {
    "llava": LlavaHost,
    "qwen2_5_vl": Qwen2_5VLHost,
    "qwen2_vl": Qwen2VLHost,
    "qwen3_vl": Qwen3VLHost,
    "fastvlm": FastVLMHost,
    "llava_qwen2": FastVLMHost,  # as Apple's own config.json calls it
    "llava_next": LlavaNextHost,
    "gemma3": Gemma3Host,
    "idefics3": Idefics3Host,
    "smolvlm": Idefics3Host,
    "paligemma": PaliGemmaHost,
    "internvl_chat": InternVLHost,
    "pixtral": PixtralHost,
    "qwen3_5": Qwen3_5Host,
    "qwen3_5_moe": Qwen3_5Host,
    "gemma4": Gemma4Host,
    "llava_onevision": LlavaOnevisionHost,
    "lfm2_vl": Lfm2VLHost,
    "lfm2-vl": Lfm2VLHost,  # as older releases of it write it
}
# Models without visual tokens to prune, or without a language model.
REFUSED = {
    "mllama": "it reads images by cross-attention, so no visual token is in its sequence",
    "clip": "it has no language model; `mlx-vlm-prune encode` is for such models",
    "siglip": "it has no language model; `mlx-vlm-prune encode` is for such models",
    "florence2": "it reads images by an encoder, so no visual token is in its sequence",
}


def host_of(model: Any, processor: Any = None) -> Host:
    """The host of a model. Raises UserError for a family without pruning."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise UserError(f"there is no pruning in {kind} models; there is in {', '.join(FAMILIES)}")
    modules = [base.__module__.partition(".models.") for base in type(model).__mro__]
    names = [module.partition(".")[0] for package, _, module in modules if package == "mlx_vlm"]
    name = names[0] if names else kind  # the next ones are families that it is derived from
    if FAMILIES.get(name, FAMILIES[kind]) is not FAMILIES[kind]:
        raise UserError(f"a {name} model's config calls it a {kind} model; correct model_type")
    return FAMILIES[kind](model, processor)
