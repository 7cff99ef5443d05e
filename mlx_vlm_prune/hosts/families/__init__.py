"""The families of mlx-vlm's models, one a file: tower, projector, prompt. Add families here.

To add one: its file, a line here, and a tiny model in the tests.
"""

from typing import Any

from ...checkpoints.errors import UserError
from ..host import Host
from .fastvlm import FastVLMHost
from .gemma3 import Gemma3Host
from .idefics3 import Idefics3Host
from .internvl_chat import InternVLHost
from .llava import LlavaHost
from .llava_next import LlavaNextHost
from .paligemma import PaliGemmaHost
from .pixtral import PixtralHost
from .qwen2_5_vl import Qwen2_5VLHost
from .qwen2_vl import Qwen2VLHost
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
    for base in type(model).__mro__:
        package, _, module = base.__module__.partition(".models.")
        name = module.partition(".")[0]
        if package == "mlx_vlm" and FAMILIES.get(name, FAMILIES[kind]) is not FAMILIES[kind]:
            raise UserError(f"a {name} model's config calls it a {kind} model; correct model_type")
    return FAMILIES[kind](model, processor)
