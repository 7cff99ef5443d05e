"""Checkpoints whole, as they are read: MiniMind-V as published, and ours.

Published: a .pth (or a folder with one, or with Hugging Face's weight files), the
vision tower in a folder of its own, and the tokenizer in another. Ours: one folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import llava, llava_original
from .detect import our_tensors, text_config, tidy, untied, vision_config
from .errors import UserError
from .files import read_json
from .generations import DEFAULT, GENERATIONS, MODEL_TYPES, Generation, recognise
from .names import LLAMA, NAFLEX, SIGLIP, Table, published_order, to_published
from .shapes import check_complete
from .tensors import RawTensor
from .weights import read_weights

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json",
    "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
READING = "preprocessor_config.json"
# Nothing here reads these; they go with a LLaVA, so that it comes back as it was.
CARRIED = ("generation_config.json", "processor_config.json")
LEARNED = "pruners.safetensors"
TOWER_PLACES = (
    "clip",
    "clip-vit-base-patch16",
    "vision_model/clip-vit-base-patch16",
    "siglip",
    "siglip2-base-p32-256-ve",
    "siglip2-base-p16-256-ve",
    "siglip2-base-p16-ve",
)


@dataclass(frozen=True)
class Published:
    """A published checkpoint under our names and in our layout, checked to be complete.

    `sizes` has text_config, vision_config and, where they are, projector and pruner.
    `reading` is the folder of preprocessor_config.json, or None where there is none. `guessed`
    says that nothing told how many heads there are.
    """

    tensors: dict[str, RawTensor]
    sizes: dict[str, Any]
    generation: Generation
    reading: Path | None
    guessed: bool


@dataclass(frozen=True)
class Source:
    """Everything that goes into one of our folders, and the folders the rest of it lies in."""

    config: dict[str, Any]
    tensors: dict[str, RawTensor]
    tokenizer: Path
    reading: Path | None
    guessed: bool = False  # how many heads there are
    learned: Path | None = None  # weights of learned pruners, which lie beside a model of ours
    twig: Mapping[str, RawTensor] = field(default_factory=dict)  # goes with them
    beside: Path | None = None  # where files lie that are carried along


def is_ours(folder: Path) -> bool:
    """Is this one of our own checkpoint folders?"""
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") in MODEL_TYPES


def read_published(
    source: Path,
    vision: Path | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
) -> Published:
    """Read a .pth or a folder with weights, and the tower from `vision` or a folder beside them.

    Raises UserError, naming file and tensor, for whatever does not fit.
    """
    state = tidy(read_weights(source), source)
    home = _home(source)
    folder = vision or tower_folder(source)
    told_apart(state, source)
    tower, told = _read_tower(state, source, folder, vision is not None)
    rest = {name: tensor for name, tensor in state.items() if not is_tower(name)}
    generation = told_apart(rest | tower, source)  # some differ by the tower's width alone
    ours = our_tensors(untied(rest, generation, source), generation, source)
    heads, kv_heads = told_heads(source, heads, kv_heads)
    text = text_config(ours, generation, source, heads, kv_heads)
    seen = our_tensors(tower, generation, folder or source)
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    ours = as_ours(ours | seen, generation, head_dim)
    sizes: dict[str, Any] = {
        "text_config": text,
        "vision_config": vision_config(ours, generation.tower_type, told, folder or source),
    }
    if "projector.fc1.weight" in ours:
        norm = "projector.norm.weight" in ours
        sizes["projector"] = {"merge": list(generation.merge), "norm": norm}
    if queries := ours.get("pruner.queries"):
        sizes["pruner"] = {"name": "attention_pool", "tokens": queries.shape[0]}
    check_complete(ours, sizes, source)
    reading = next((f for f in (folder, home) if f and (f / READING).is_file()), None)
    guessed = not (heads or kv_heads or text.get("qk_norm"))
    return Published(ours, sizes, generation, reading, guessed)


def told_apart(state: Mapping[str, RawTensor], where: Path) -> Generation:
    """The generation of a state dict; UserError that says what it is instead."""
    found = recognise(state)
    if isinstance(found, str):
        raise UserError(f"{where} {found}")
    return found


def tower_folder(source: Path) -> Path | None:
    """Where a tower lies beside a checkpoint, if one does."""
    home = _home(source)
    return next((home / place for place in TOWER_PLACES if (home / place).is_dir()), None)


def told_heads(
    source: Path, heads: int | None, kv_heads: int | None
) -> tuple[int | None, int | None]:
    """As given, or as a Hugging Face folder's config.json says."""
    config = source / "config.json"
    if heads or kv_heads or not config.is_file():
        return heads, kv_heads
    told = read_json(config)
    own = [told.get(f"num_{name}_heads") for name in ("attention", "key_value")]
    heads, kv_heads = (n if type(n) is int and 0 < n <= 1024 else None for n in own)
    return heads, kv_heads


def as_ours(
    tensors: Mapping[str, RawTensor], generation: Generation, head_dim: int
) -> dict[str, RawTensor]:
    """Tensors under our names, their values in our order."""
    ours = {}
    for name, tensor in tensors.items():
        found = to_published(generation.table, name)
        change = found and found[1].change
        ours[name] = change.there(tensor, head_dim) if change else tensor
    return ours


def as_published(
    tensors: Mapping[str, RawTensor], table: Table, head_dim: int, where: Path
) -> dict[str, RawTensor]:
    """Our tensors under the names of a table, in its layout and order."""
    state: dict[str, RawTensor] = {}
    for name, tensor in tensors.items():
        found = to_published(table, name)
        if found is None:
            raise UserError(f"{where} holds a tensor {name} that its generation has no place for")
        new, rule = found
        state[new] = rule.change.back(tensor, head_dim) if rule.change else tensor
    return {name: state[name] for name in published_order(table, state)}


def torch_tensors(published: Published) -> dict[str, RawTensor]:
    """The same in PyTorch's layout, under the names of the latest release of its family."""
    generation, text = published.generation, published.sizes["text_config"]
    tower = SIGLIP if generation.tower == NAFLEX else generation.tower
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    table = LLAMA + generation.projector + tower
    return as_published(published.tensors, table, head_dim, Path())


def as_mlx(
    source: Path,
    vision: Path | None = None,
    tokenizer: Path | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
) -> Source:
    """A published checkpoint, or a folder of ours, as what goes into one: nothing is written.

    Without `vision` and `tokenizer` they are looked for in or beside `source`. Raises UserError.
    """
    if is_ours(source):
        reading = source if (source / READING).is_file() else None
        config, tensors = _own(source)
        learned = source / LEARNED if (source / LEARNED).is_file() else None
        return Source(config, tensors, tokenizer or source, reading, learned=learned, beside=source)
    if llava.is_published(source):
        return _composed(source, vision, tokenizer or source)
    published = read_published(source, vision, heads, kv_heads)
    generation, words = published.generation, tokenizer or _home(source)
    dtype = published.tensors["language.embed_tokens.weight"].dtype
    config = {
        **_words(words, generation),
        **published.sizes,
        "model_type": generation.model_type,
        "published_as": generation.name,
        "torch_dtype": next(k for k, v in DTYPES.items() if v == dtype),
    }
    return Source(config, published.tensors, words, published.reading, published.guessed)


def _composed(source: Path, vision: Path | None, words: Path) -> Source:
    """A LLaVA-style model as Hugging Face has it, or as its authors do."""
    state, tower = llava_original.parts(source, vision)
    config, tensors = llava.composed(state, source, tower)
    dtype = next(tensor.dtype for name, tensor in tensors.items() if name.startswith("language."))
    told = {"torch_dtype": next(k for k, v in DTYPES.items() if v == dtype)}
    reading = next((f for f in (tower, source) if f and (f / READING).is_file()), None)
    config |= told | llava.words(config["published"], words)
    return Source(config, tensors, words, reading, beside=source)


def _home(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def _read_tower(
    state: Mapping[str, RawTensor], source: Path, folder: Path | None, asked: bool
) -> tuple[dict[str, RawTensor], dict[str, Any]]:
    """The tower's tensors and what its config.json says; a training checkpoint has its own."""
    inside = {name: tensor for name, tensor in state.items() if is_tower(name)}
    if inside and not asked:
        return inside, {}
    if folder is None:
        raise UserError(
            f"{source} holds no vision tower (MiniMind-V is published without one); give the"
            " folder of its CLIP or SigLIP with --vision"
        )
    tensors = tidy(read_weights(folder), folder)
    return {k: v for k, v in tensors.items() if is_tower(k)}, read_json(folder / "config.json")


def is_tower(name: str) -> bool:
    return name.startswith("vision_model.")


def _words(folder: Path, generation: Generation) -> dict[str, Any]:
    """What config.json says of the tokenizer."""
    from tokenizers import Tokenizer

    file = folder / TOKENIZER_FILES[0]
    if not file.is_file():
        raise UserError(f"there is no {file}; give the folder of the tokenizer with --tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises bare Exception
        raise UserError(f"{file} is no tokenizer ({e})") from None
    image = generation.image_token
    token = tokenizer.token_to_id(image)
    if token is None:
        raise UserError(
            f"{file} has no token {image!r}, the place for an image in {generation.title}"
        )
    told = folder / TOKENIZER_FILES[1]
    end = read_json(told).get("eos_token") if told.is_file() else None
    end = end.get("content") if isinstance(end, Mapping) else end
    end_id = tokenizer.token_to_id(end) if isinstance(end, str) else None
    return {"eos_token_id": end_id, "image_token": image, "image_token_id": token}


def generation_of(config: Mapping[str, Any], where: Path) -> Generation:
    """As what one of our folders was published."""
    name = config.get("published_as", DEFAULT)
    if not isinstance(name, str) or name not in GENERATIONS:
        raise UserError(f"{where}: published_as is {name!r}, none of {', '.join(GENERATIONS)}")
    return GENERATIONS[name]


def title_of(config: Mapping[str, Any], where: Path) -> str:
    """What one of our folders is."""
    if is_composed(config):
        return llava.layout_of(config, where).title
    return generation_of(config, where).title


def is_composed(config: Mapping[str, Any]) -> bool:
    """Is it of a LLaVA-style model, rather than of a MiniMind-V?"""
    return config.get("model_type") == llava.MODEL_TYPE


def read_ours(folder: Path) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """config.json and tensors of one of our folders that is not quantized; raises UserError."""
    if not is_ours(folder):
        raise UserError(f"{folder} is none of our checkpoint folders (see to-mlx)")
    config, tensors = _own(folder)
    if "quantization" in config:
        raise UserError(f"{folder} is quantized; convert it to-mlx with --dequantize first")
    return config, tensors


def _own(folder: Path) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    config, tensors = read_json(folder / "config.json"), read_weights(folder)
    title_of(config, folder)
    check_complete(tensors, config, folder)
    return config, tensors


def head_size(config: Mapping[str, Any], where: Path) -> int:
    """Of the language model of a config.json."""
    text = config["text_config"]
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    if type(hidden) is not int or type(heads) is not int or heads < 1 or hidden % heads:
        raise UserError(f"{where}: {heads} heads do not divide a hidden_size of {hidden}")
    return hidden // heads
