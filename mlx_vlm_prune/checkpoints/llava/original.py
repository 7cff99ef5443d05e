"""LLaVA-1.5 as its authors publish it: a Llama with a projector, and CLIP in a folder of its own.

config.json is the language model's, with fields `mm_*` for the rest (github.com/haotian-liu/LLaVA).
It is read as if transformers had written it. A tower that was trained with the rest lies inside;
only its tensors tell its sizes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import CLIP_TYPE, CONFIG, VLMConfig
from ..errors import UserError, quoted
from ..names.renaming import to_our_names, to_our_order
from ..names.rules import to_ours
from ..reading.files import optional_json, read_json
from ..reading.tensors import RawTensor
from ..reading.weights import read_weights
from ..tower import is_tower, split_tower, vision_config
from .layouts import ORIGINAL, tower_table

TYPES = ("llava", "llava_llama")
TITLE = ORIGINAL["llava"].title
INSIDE = f"{ORIGINAL['llava'].tower}."
IMAGE_TOKEN = "<unk>"  # stands where an image is: the authors' vocabulary has no token for it
# Fields of config.json: the value of one that is left out, and the values that are supported.
FIELDS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "model_type": (None, TYPES),
    "mm_projector_type": ("linear", ("linear", "mlp2x_gelu")),
    "mm_vision_select_feature": ("patch", ("patch",)),
    "mm_resampler_type": (None, (None,)),
    "mm_use_im_start_end": (False, (False,)),
    "mm_patch_merge_type": ("flat", ("flat",)),
    "image_aspect_ratio": ("square", ("square", "pad", None)),
    "s2": (False, (False, None)),
}


def is_original(config: Mapping[str, Any]) -> bool:
    """Is this the config.json of the authors' layout, or of one derived from it?"""
    return isinstance(config.get("mm_vision_tower"), str) and "text_config" not in config


def is_original_folder(folder: Path) -> bool:
    return is_original(optional_json(folder / CONFIG))


def read_state(source: Path, vision: Path | None) -> tuple[dict[str, RawTensor], Path | None]:
    """The tensors of any LLaVA-style folder, and the folder of its tower where that lies apart.

    That is `vision`, or a folder inside `source` with the name of the tower in config.json.
    """
    state = read_weights(source)
    tower_folder = _tower_folder(source, state, vision)
    if tower_folder:
        state |= split_tower(read_weights(tower_folder))[1]
    return state, tower_folder


def _tower_folder(source: Path, state: Mapping[str, RawTensor], vision: Path | None) -> Path | None:
    if not is_original_folder(source) or any(name.startswith(INSIDE) for name in state):
        if vision:
            raise UserError(
                f"{source} holds the tower it was trained with; leave out vision=FOLDER"
            )
        return None
    beside = source / _folder_name(read_json(source / CONFIG)["mm_vision_tower"])
    return vision or (beside if beside.is_dir() else None)


def lacks_tower(state: Mapping[str, RawTensor]) -> bool:
    return not any(name.startswith(INSIDE) or is_tower(name) for name in state)


def tower_advice(source: Path) -> str:
    """What to do where the tower is missing."""
    name = read_json(source / CONFIG)["mm_vision_tower"]
    return (
        f"{source} holds no vision tower: give the folder of {name} to convert to-mlx"
        f" (vision=FOLDER), or put it at {source / _folder_name(name)}"
    )


def as_transformers(
    state: Mapping[str, RawTensor], source: Path, tower_folder: Path | None
) -> dict[str, Any]:
    """config.json as transformers' layout has it; `tower_folder` is None for a tower inside.

    Raises UserError, naming file and field, for what is not supported.
    """
    where = source / CONFIG
    config = read_json(where)
    check_fields(config, where)
    if lacks_tower(state):
        raise UserError(tower_advice(source))
    return {
        "text_config": {**config, "model_type": "llama"},
        "vision_config": _vision_config(state, source, tower_folder),
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default",
    }


def check_fields(config: Mapping[str, Any], where: Path) -> None:
    """UserError that names a field whose value LLaVA-1.5 does not have."""
    for name, (default, allowed) in FIELDS.items():
        if (value := config.get(name, default)) not in allowed:
            names = " or ".join(str(each) for each in allowed if each is not None) or "none"
            raise UserError(
                f"{where}: {name} is {str(value)[:40]!r}; of LLaVA's own layout LLaVA-1.5 is"
                f" supported, which has {names}"
            )


def pads_to_square(config: Any) -> bool:
    """Are pictures padded to a square first?"""
    return isinstance(config, Mapping) and config.get("image_aspect_ratio") == "pad"


def transformers_config(config: Mapping[str, Any], sizes: VLMConfig, where: Path) -> dict[str, Any]:
    """config.json of transformers' layout, from ours of a model published in the authors'.

    `sizes` is ours parsed.

    Raises UserError for a projector of one matrix, which transformers has no class for.
    """
    if sizes.projector is None:
        raise UserError(f"{where}: transformers has no class for a LLaVA whose projector is linear")
    text, vision, published = (config[x] for x in ("text_config", "vision_config", "published"))
    text = {k: v for k, v in text.items() if k not in ("runner", "lm_head_bias")}
    ends = [name for name in ("bos_token_id", "eos_token_id") if name in published]
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": sizes.image_token_id,
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "text_config": {**text, **{name: published[name] for name in ends}},
        "tie_word_embeddings": text.get("tie_word_embeddings", True),
        "torch_dtype": config.get("torch_dtype", "float32"),
        "vision_config": {k: v for k, v in vision.items() if k != "feature_layers"},
        "vision_feature_layer": sizes.vision.depth,
        "vision_feature_select_strategy": "default",
    }


def token_fields(tokenizer: Any, config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The fields of our config.json about the tokenizer, which was read from `file`."""
    number, size = tokenizer.token_to_id(IMAGE_TOKEN), config.get("vocab_size")
    if number is None:
        raise UserError(f"{file} has no token {IMAGE_TOKEN!r}, which is put where an image goes")
    if type(size) is not int or number >= size:
        raise UserError(f"{file}: {IMAGE_TOKEN!r} is token {number}, of a vocabulary of {size}")
    return {"image_token": IMAGE_TOKEN, "image_token_id": number}


def _vision_config(
    state: Mapping[str, RawTensor], source: Path, folder: Path | None
) -> dict[str, Any]:
    """The tower's sizes, from its tensors and the config.json in a folder of its own."""
    where, name = folder or source, read_json(source / CONFIG)["mm_vision_tower"]
    # Other towers have heads of other sizes, and no tensor tells.
    if not folder and not _folder_name(name).startswith("clip-vit-"):
        raise UserError(
            f"{source}: the tower inside is {name}; of towers inside only OpenAI's clip-vit-… is"
            " supported"
        )
    tower_config = read_json(where / CONFIG) if folder else {}
    kind = tower_config.get("model_type", CLIP_TYPE)
    if kind not in ("clip", CLIP_TYPE):
        raise UserError(
            f"{where} is a {quoted(kind)}; the tower of a LLaVA in its own layout is CLIP"
        )
    table = tower_table(ORIGINAL["llava-apart" if folder else "llava"].tower, clip=True)
    tower = {name: tensor for name, tensor in state.items() if to_ours(table, name)}
    tensors = to_our_order(to_our_names(tower, table, TITLE, where), table, 1)
    return vision_config(tensors, CLIP_TYPE, tower_config, where)


def _folder_name(tower: str) -> str:
    """The last part of a tower's name or path."""
    name = Path(tower.replace("\\", "/")).name
    return name if name.strip(".") else "clip"
