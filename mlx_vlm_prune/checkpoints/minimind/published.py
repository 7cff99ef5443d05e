"""MiniMind-V as published: a .pth, or a folder with one or with Hugging Face's weight files.

Its vision tower lies inside or in a folder of its own, its tokenizer beside the weights or
elsewhere.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, language_dtype
from ..config import ATTENTION_POOL, CONFIG, parse_sizes
from ..errors import UserError, quoted
from ..names.renaming import (
    Tensors,
    check_tied,
    to_our_names,
    to_our_order,
    to_published_layout,
)
from ..names.rules import published_order, to_ours, to_published
from ..names.towers import NAFLEX, SIGLIP
from ..processor import (
    TOKENIZER,
    TOKENIZER_ADVICE,
    end_ids,
    preprocessor_folder,
    read_tokenizer,
    special_tokens,
    token_settings,
)
from ..reading.files import optional_json, read_json
from ..reading.paths import is_here
from ..reading.tensors import RawTensor
from ..reading.weights import read_weights, weight_files
from ..shapes import check_complete
from ..tower import is_tower, split_tower, vision_config
from .generations import Generation, recognise
from .projector import PROJECTOR, untrained_projector
from .sizes import text_config
from .tables import LLAMA

# Where MiniMind-V's own code looks for the tower, beside the weights.
TOWER_FOLDERS = (
    "clip",
    "clip-vit-base-patch16",
    "vision_model/clip-vit-base-patch16",
    "siglip",
    "siglip2-base-p32-256-ve",
    "siglip2-base-p16-256-ve",
    "siglip2-base-p16-ve",
)
TOKENIZER_FOLDERS = ("minimind_tokenizer", "model/minimind_tokenizer", "model", "tokenizer")


@dataclass(frozen=True)
class Published:
    """A published MiniMind-V.

    `raw` has the tensors under the file's names, `tensors` under ours and in our order. `sizes` has
    the parts text_config of our config.json and, where the files have them, vision_config,
    projector and pruner. `tower_folder` is None where the tower lies inside. `heads_assumed`: no
    file says how many attention heads there are.
    """

    raw: dict[str, RawTensor]
    tensors: dict[str, RawTensor]
    sizes: dict[str, Any]
    generation: Generation
    tower_folder: Path | None
    preprocessor_folder: Path | None
    heads_assumed: bool


def read_checkpoint(
    source: Path,
    vision: Path | None = None,
    tokenizer: Path | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    projector_seed: int | None = None,
) -> Checkpoint:
    """A published MiniMind-V and its tokenizer; UserError for what is missing or does not fit."""
    tokenizer_folder = tokenizer or tokenizer_folder_beside(source)
    published = open_published(source, vision, heads, kv_heads, projector_seed)
    if "vision_config" not in published.sizes and not is_here(tokenizer_folder / TOKENIZER):
        raise UserError(
            f"{source} holds neither a vision tower (MiniMind-V is published without one; give the"
            " folder of its CLIP or SigLIP by vision=FOLDER) nor a tokenizer.json (give its folder"
            " by tokenizer=FOLDER)"
        )
    _check(published, source)
    generation = published.generation
    config = {
        **_token_fields(tokenizer_folder, generation, source),
        **published.sizes,
        **_unusual_keys(published, source),
        "model_type": generation.model_type,
        "published_as": generation.name,
        "torch_dtype": language_dtype(published.tensors),
    }
    return Checkpoint(
        config,
        published.tensors,
        tokenizer_folder,
        published.preprocessor_folder,
        published.heads_assumed,
        carried_folder=source if source.is_dir() else None,
    )


def read_published(
    source: Path,
    vision: Path | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    projector_seed: int | None = None,
) -> Published:
    """A MiniMind-V's weights, its tower from `vision`, from inside or from a folder beside them.

    Raises UserError, naming file and tensor, for what is missing or does not fit.
    """
    published = open_published(source, vision, heads, kv_heads, projector_seed)
    _check(published, source)
    return published


def _check(published: Published, source: Path) -> None:
    """UserError for what is missing of a model that was opened."""
    if "vision_config" not in published.sizes:
        raise UserError(
            f"{source} holds no vision tower (MiniMind-V is published without one); give the"
            " folder of its CLIP or SigLIP to convert to-mlx (vision=FOLDER)"
        )
    check_tied(published.raw, *published.generation.tied, source)
    check_complete(published.tensors, parse_sizes(published.sizes, source), source)


def open_published(
    source: Path,
    vision: Path | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    projector_seed: int | None = None,
) -> Published:
    """The same, but the tower and other tensors may be missing. Only names and shapes are read.

    With `projector_seed` a language model alone gets an untrained projector.
    """
    raw = read_weights(source)
    rest, tower = split_tower(raw)
    folder = vision or _tower_folder_beside(source)
    apart = folder if vision or not tower else None  # a training checkpoint has its tower inside
    tower_config: dict[str, Any] = {}
    if apart:
        _, tower = split_tower(read_weights(apart))
        tower_config = read_json(apart / CONFIG)
    if projector_seed is not None and not any(name.startswith(PROJECTOR) for name in rest):
        rest |= untrained_projector(rest, tower, projector_seed, source)
    generation = recognise(rest | tower, source)  # some differ by the tower's width alone
    table, title = generation.table, generation.title
    rest.pop(generation.tied[0], None)
    tensors = to_our_names(rest, table, title, source)
    tensors |= to_our_names(tower, table, title, folder or source)
    if not (heads or kv_heads):
        heads, kv_heads = _heads_in_config(source)
    text = text_config(tensors, generation, source, heads, kv_heads)
    tensors = to_our_order(tensors, table, text["hidden_size"] // text["num_attention_heads"])
    sizes = {"text_config": text, **_projector_sizes(tensors, generation)}
    if tower or apart:
        where = folder or source
        sizes["vision_config"] = vision_config(tensors, generation.tower_type, tower_config, where)
    return Published(
        raw, tensors, sizes, generation, apart,
        preprocessor_folder=preprocessor_folder(folder, _folder(source)),
        heads_assumed=not (heads or kv_heads or text.get("qk_norm")),
    )  # fmt: skip


def _folder(source: Path) -> Path:
    """The folder of a file, or the folder itself."""
    return source if source.is_dir() else source.parent


def _tower_folder_beside(source: Path) -> Path | None:
    places = (_folder(source) / name for name in TOWER_FOLDERS)
    return next((place for place in places if place.is_dir()), None)


def tokenizer_folder_beside(source: Path) -> Path:
    """Where the tokenizer lies: beside the weights, or where MiniMind-V's own code keeps it."""
    here = _folder(source)
    places = (here, *(here / name for name in TOKENIZER_FOLDERS))
    return next((place for place in places if is_here(place / TOKENIZER)), here)


def usual_keys(names: Iterable[str], generation: Generation) -> list[str]:
    """The keys of a .pth as the authors' code writes it, from all but the tower's names in the
    order of the model: the output layer, which is the embedding again, behind the last norm."""
    keys: list[str] = []
    head, embedding = generation.tied
    last_norm = to_published(generation.language, "language.norm.weight")
    others = [name for name in names if not is_tower(name) and name != head]
    for name in others:
        keys.append(name)
        if last_norm and name == last_norm[0] and embedding in others:
            keys.append(head)
    return keys


def _unusual_keys(published: Published, source: Path) -> dict[str, Any]:
    """The field `published_keys` of our config.json, where a pickle has its keys in another order
    than the authors' code writes, or the output layer not at all."""
    files = weight_files(source) if source.is_dir() else [source]
    if files[0].suffix == ".safetensors":  # which has no order of its own
        return {}
    generation, held = published.generation, split_tower(published.raw)[0]
    keys = [k for k in held if k == generation.tied[0] or to_ours(generation.table, k)]
    usual = usual_keys(
        published_order(generation.table, {*keys} - {generation.tied[0]}), generation
    )
    return {} if keys == usual else {"published_keys": keys}


def _heads_in_config(source: Path) -> tuple[int | None, int | None]:
    """Query and key/value heads, as a Hugging Face folder's config.json has them."""
    config = optional_json(source / CONFIG)
    both = (config.get(f"num_{name}_heads") for name in ("attention", "key_value"))
    heads, kv_heads = (n if type(n) is int and 0 < n <= 1024 else None for n in both)
    return heads, kv_heads


def _projector_sizes(tensors: Tensors, generation: Generation) -> dict[str, Any]:
    """The parts of our config.json about a projector of two layers, and a learned pruner inside."""
    sizes: dict[str, Any] = {}
    if "projector.fc1.weight" in tensors:
        has_norm = "projector.norm.weight" in tensors
        sizes["projector"] = {"merge": list(generation.merge), "norm": has_norm}
    if queries := tensors.get("pruner.queries"):
        sizes["pruner"] = {
            "name": ATTENTION_POOL,
            "tokens": queries.shape[0] if queries.shape else 0,
        }
    return sizes


def _token_fields(folder: Path, generation: Generation, source: Path) -> dict[str, Any]:
    """The fields of our config.json about the tokenizer in a folder."""
    tokenizer, image_token = read_tokenizer(folder, TOKENIZER_ADVICE), generation.image_token
    image_token_id = tokenizer.token_to_id(image_token)
    if image_token_id is None:
        raise UserError(
            f"{folder / TOKENIZER} has no token {quoted(image_token)}, the place for an image in"
            f" {generation.title}"
        )
    end = special_tokens(token_settings(folder)).get("eos_token")
    ends = {None if end is None else tokenizer.token_to_id(end)}
    ends |= end_ids(source) if source.is_dir() else set()
    numbers = sorted(number for number in ends if number is not None)
    return {
        "eos_token_id": numbers if numbers[1:] else next(iter(numbers), None),
        "image_token": image_token,
        "image_token_id": image_token_id,
    }


def torch_tensors(published: Published, head_dim: int) -> dict[str, RawTensor]:
    """The tensors in PyTorch's layout, under the names of the latest release of the family."""
    generation = published.generation
    tower = SIGLIP if generation.tower == NAFLEX else generation.tower
    table = LLAMA + generation.projector + tower
    return to_published_layout(published.tensors, table, head_dim, Path())
