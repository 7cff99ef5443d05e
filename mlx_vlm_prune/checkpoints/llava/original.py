"""LLaVA-1.5 as its authors publish it: a Llama with a projector, and CLIP in a folder of its own.

config.json is the language model's, with fields `mm_*` for the rest (github.com/haotian-liu/LLaVA).
It is read as if Hugging Face had written it. A tower that was trained with the rest lies inside,
and only its tensors say how large it is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import CONFIG, TOWERS, VLMConfig
from ..errors import UserError
from ..names.renaming import as_ours, renamed
from ..names.tables import to_ours
from ..reading.files import optional_json, read_json
from ..reading.tensors import RawTensor
from ..reading.weights import read_weights
from ..sizes import tidy, vision_config
from .names import ORIGINAL, tower

TYPES = ("llava", "llava_llama")
TITLE = ORIGINAL["llava"].title
INSIDE = f"{ORIGINAL['llava'].tower}."
IMAGE_TOKEN = "<unk>"  # stands where an image is: the authors' vocabulary has no token for it
# What else the authors' code can do, and its value where config.json says nothing.
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


def is_original(told: Mapping[str, Any]) -> bool:
    """Is this the config.json of one in the authors' layout, or in one derived from it?"""
    return isinstance(told.get("mm_vision_tower"), str) and "text_config" not in told


def is_one(folder: Path) -> bool:
    return is_original(optional_json(folder / CONFIG))


def parts(source: Path, vision: Path | None) -> tuple[dict[str, RawTensor], Path | None]:
    """The tensors of any LLaVA-style folder, and the folder of its tower where that lies apart:
    `vision`, or one beside the weights that is called as its config.json calls the tower."""
    state = read_weights(source)
    folder = _tower_folder(source, state, vision)
    if folder:
        apart = tidy(read_weights(folder))
        state |= {k: v for k, v in apart.items() if k.startswith("vision_model.")}
    return state, folder


def _tower_folder(source: Path, state: Mapping[str, RawTensor], asked: Path | None) -> Path | None:
    if not is_one(source) or any(name.startswith(INSIDE) for name in state):
        if asked:
            raise UserError(f"{source} holds the tower it was trained with; leave out --vision")
        return None
    beside = source / _name(read_json(source / CONFIG)["mm_vision_tower"])
    return asked or (beside if beside.is_dir() else None)


def lacks_tower(state: Mapping[str, RawTensor]) -> bool:
    return not any(name.startswith((INSIDE, "vision_model.")) for name in state)


def as_hugging_face(
    state: Mapping[str, RawTensor], source: Path, apart: Path | None
) -> dict[str, Any]:
    """config.json as Hugging Face's layout has it; `apart` is the folder of one that lies apart.

    Raises UserError, naming file and field, for whatever is computed otherwise.
    """
    where = source / CONFIG
    told = read_json(where)
    check(told, where)
    if lacks_tower(state):
        name = told["mm_vision_tower"]
        raise UserError(
            f"{source} holds no vision tower: give the folder of {name} with --vision of"
            f" python -m mlx_vlm_prune convert to-mlx, or put it at {source / _name(name)}"
        )
    return {
        "text_config": {**told, "model_type": "llama"},
        "vision_config": _tower(state, source, apart),
        "vision_feature_layer": told.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default",
    }


def check(told: Mapping[str, Any], where: Path) -> None:
    """UserError that names a field which asks for something else than LLaVA-1.5."""
    for name, (usual, allowed) in FIELDS.items():
        if (value := told.get(name, usual)) not in allowed:
            names = " or ".join(str(each) for each in allowed if each is not None) or "none"
            raise UserError(
                f"{where}: {name} is {str(value)[:40]!r}; of LLaVA's own layout LLaVA-1.5 is"
                f" supported, which has {names}"
            )


def pads(told: Any) -> bool:
    """Are pictures first made square?"""
    return isinstance(told, Mapping) and told.get("image_aspect_ratio") == "pad"


def for_transformers(config: Mapping[str, Any], sizes: VLMConfig, where: Path) -> dict[str, Any]:
    """config.json of Hugging Face's layout, from ours of a model in the authors'; `sizes` is it
    parsed.

    Raises UserError for a projector of one matrix, which transformers has no class for.
    """
    if sizes.projector is None:
        raise UserError(f"{where}: transformers has no class for a LLaVA whose projector is linear")
    text, seen, published = (config[x] for x in ("text_config", "vision_config", "published"))
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
        "vision_config": {k: v for k, v in seen.items() if k != "feature_layers"},
        "vision_feature_layer": sizes.vision.depth,
        "vision_feature_select_strategy": "default",
    }


def words(tokenizer: Any, told: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What our config.json says of the tokenizer, which was read from `file`."""
    number, size = tokenizer.token_to_id(IMAGE_TOKEN), told.get("vocab_size")
    if number is None:
        raise UserError(f"{file} has no token {IMAGE_TOKEN!r}, which is put where an image goes")
    if type(size) is not int or number >= size:
        raise UserError(f"{file}: {IMAGE_TOKEN!r} is token {number}, of a vocabulary of {size}")
    return {"image_token": IMAGE_TOKEN, "image_token_id": number}


def _tower(state: Mapping[str, RawTensor], source: Path, folder: Path | None) -> dict[str, Any]:
    """Its sizes, as its tensors have them; a folder of its own says the rest."""
    where, name = folder or source, read_json(source / CONFIG)["mm_vision_tower"]
    if not folder and not _name(name).startswith("clip-vit-"):  # others have heads of other sizes
        raise UserError(
            f"{source}: the tower inside is {name}; of towers inside only OpenAI's clip-vit-… is"
            " supported"
        )
    given = read_json(where / CONFIG) if folder else {}
    kind = given.get("model_type", TOWERS[0])
    if kind not in ("clip", TOWERS[0]):
        raise UserError(f"{where} is a {kind!r}; the tower of a LLaVA in its own layout is CLIP")
    names = tower(ORIGINAL["llava-apart" if folder else "llava"].tower, clip=True)
    seen = renamed({k: v for k, v in state.items() if to_ours(names, k)}, names, TITLE, where)
    return vision_config(as_ours(seen, names, 1), TOWERS[0], given, where)


def _name(tower: str) -> str:
    """How its folder is called, wherever that is."""
    name = Path(tower.replace("\\", "/")).name
    return name if name.strip(".") else "clip"
