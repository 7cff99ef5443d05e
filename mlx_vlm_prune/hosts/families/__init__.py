"""One file for each family: how its tower is run, and how it wants its visual tokens back.

To add one: its file, a line here, and a tiny model in the tests.
"""

from . import (
    fastvlm,
    idefics3,
    internvl_chat,
    llava,
    llava_next,
    pixtral,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    siglip,
)  # fmt: skip
from .common import Family

FAMILIES: dict[str, Family] = {
    "llava": llava.family,
    "qwen2_5_vl": qwen2_5_vl.family,
    "qwen2_vl": qwen2_vl.family,
    "qwen3_vl": qwen3_vl.family,
    "fastvlm": fastvlm.family,
    "llava_qwen2": fastvlm.family,  # as Apple's own config.json calls it
    "llava_next": llava_next.family,
    "gemma3": siglip.gemma3,
    "idefics3": idefics3.family,
    "smolvlm": idefics3.family,
    "paligemma": siglip.paligemma,
    "internvl_chat": internvl_chat.family,
    "pixtral": pixtral.family,
}
# Models that mlx-vlm runs and that have nothing to prune.
REFUSED = {
    "mllama": "it reads images by cross-attention, so no visual token is in its sequence",
    "florence2": "it reads images by an encoder, so no visual token is in its sequence",
}

__all__ = ["FAMILIES", "REFUSED", "Family"]
