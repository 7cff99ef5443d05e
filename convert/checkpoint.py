"""Checkpoints whole: MiniMind2-V as published, ours, and each made of the other.

Published: a .pth (or a folder with one, or with Hugging Face's weight files), the
CLIP tower in a folder of its own, and the tokenizer in another. Ours: one folder.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .detect import IMAGE_TOKEN, our_tensors, text_config, tidy, vision_config
from .errors import UserError
from .files import (
    RawTensor,
    appearing,
    open_safetensors,
    read_json,
    read_pth,
    write_pth,
    write_safetensors,
)
from .names import TIED, published_order, to_published
from .shapes import check_complete

MODEL_TYPE = "minimind2_v"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
READING = "preprocessor_config.json"
CLIP_PLACES = ("clip", "clip-vit-base-patch16", "vision_model/clip-vit-base-patch16")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
CLIP_READING = {  # openai/clip-vit-base-patch16's own
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}


@dataclass(frozen=True)
class Published:
    """MiniMind2-V by its published names, its tower under CLIP's, checked to be complete.

    `sizes` has text_config, vision_config and, for learned weights, pruner. `reading` is the
    folder of preprocessor_config.json, or None where there is none.
    """

    tensors: dict[str, RawTensor]
    sizes: dict[str, Any]
    reading: Path | None


@dataclass(frozen=True)
class Source:
    """A published checkpoint under our names, and the folders the rest of it lies in."""

    config: dict[str, Any]
    tensors: dict[str, RawTensor]
    tokenizer: Path
    reading: Path | None


def is_mlx(folder: Path) -> bool:
    """Is this one of our own checkpoint folders?"""
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") == MODEL_TYPE


def read_published(
    source: Path,
    vision: Path | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
) -> Published:
    """Read a .pth or a folder with weights, and CLIP from `vision` or a folder beside them.

    Raises UserError, naming file and tensor, for whatever does not fit.
    """
    state = tidy(read_weights(source), source)
    home = _home(source)
    clip = vision or next((home / p for p in CLIP_PLACES if (home / p).is_dir()), None)
    tower, told = _read_tower(state, source, clip, vision is not None)
    rest = {name: tensor for name, tensor in state.items() if not _is_tower(name)}
    sizes: dict[str, Any] = {
        "text_config": text_config(rest, source, heads, kv_heads),
        "vision_config": vision_config(tower, told, clip or source),
    }
    if queries := rest.get("vision_proj.pool_queries"):
        sizes["pruner"] = {"name": "attention_pool", "tokens": queries.shape[0]}
    check_complete(our_tensors(rest, source) | our_tensors(tower, clip or source), sizes, source)
    reading = next((f for f in (clip, home) if f and (f / READING).is_file()), None)
    return Published(rest | tower, sizes, reading)


def as_mlx(
    source: Path,
    vision: Path | None = None,
    tokenizer: Path | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
) -> Source:
    """A published checkpoint as ours: nothing is written.

    Without `vision` and `tokenizer` they are looked for in or beside `source`. Raises UserError.
    """
    published = read_published(source, vision, heads, kv_heads)
    words = tokenizer or _home(source)
    ours = our_tensors(published.tensors, source)
    dtype = next(k for k, v in DTYPES.items() if v == ours["language.embed_tokens.weight"].dtype)
    config = {**_words(words), **published.sizes, "model_type": MODEL_TYPE, "torch_dtype": dtype}
    return Source(config, ours, words, published.reading)


def _home(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def _read_tower(
    state: Mapping[str, RawTensor], source: Path, clip: Path | None, asked: bool
) -> tuple[dict[str, RawTensor], dict[str, Any]]:
    """The tower's tensors and what CLIP's config.json says; a training checkpoint has its own."""
    inside = {name: tensor for name, tensor in state.items() if _is_tower(name)}
    if inside and not asked:
        return inside, {}
    if clip is None:
        raise UserError(
            f"{source} holds no vision tower (MiniMind2-V is published without one); give the"
            " folder of CLIP ViT-B/16 with --vision"
        )
    tensors = tidy(read_weights(clip), clip)
    return {k: v for k, v in tensors.items() if _is_tower(k)}, read_json(clip / "config.json")


def _is_tower(name: str) -> bool:
    return name.startswith("vision_model.")


def read_weights(path: Path) -> dict[str, RawTensor]:
    """The tensors of a weight file, or of the one in a folder; shards are put together."""
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise UserError(f"there is no {path}")
    return open_safetensors(path) if path.suffix == ".safetensors" else read_pth(path)


def _read_folder(folder: Path) -> dict[str, RawTensor]:
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index)
        if (folder / name).is_file():
            return read_weights(folder / name)
    found = sorted(folder.glob("*.pth"))
    if len(found) == 1:
        return read_pth(found[0])
    several = f"{len(found)} .pth files: name one of them" if found else "no .pth"
    raise UserError(f"{folder} is no checkpoint: it holds no {' or '.join(WEIGHTS)}, and {several}")


def _read_shards(index: Path) -> dict[str, RawTensor]:
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, Mapping) or not all(isinstance(p, str) for p in parts.values()):
        raise UserError(f"{index} has no weight_map of file names")
    tensors: dict[str, RawTensor] = {}
    for part in sorted(set(parts.values())):
        if Path(part).name != part:
            raise UserError(f"{index} names {part!r}, which is outside its folder")
        tensors |= read_weights(index.parent / part)
    return tensors


def _words(folder: Path) -> dict[str, Any]:
    """What config.json says of the tokenizer."""
    from tokenizers import Tokenizer

    file = folder / TOKENIZER_FILES[0]
    if not file.is_file():
        raise UserError(f"there is no {file}; give the folder of the tokenizer with --tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises bare Exception
        raise UserError(f"{file} is no tokenizer ({e})") from None
    token = tokenizer.token_to_id(IMAGE_TOKEN)
    if token is None:
        raise UserError(f"{file} has no token {IMAGE_TOKEN!r}, MiniMind2-V's place for an image")
    told = folder / TOKENIZER_FILES[1]
    end = read_json(told).get("eos_token") if told.is_file() else None
    end = end.get("content") if isinstance(end, Mapping) else end
    end_id = tokenizer.token_to_id(end) if isinstance(end, str) else None
    return {"eos_token_id": end_id, "image_token": IMAGE_TOKEN, "image_token_id": token}


def to_mlx(source: Source, target: Path, dtype: str | None = None) -> None:
    """Write a published checkpoint as one of our folders, in its own precision or in `dtype`."""
    config, tensors = source.config, source.tensors
    if dtype:
        config = {**config, "torch_dtype": dtype}
        tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in tensors.items()}
    with appearing(target, folder=True) as folder:
        _write_json(folder / "config.json", config)
        write_safetensors(folder / "model.safetensors", tensors, "mlx")
        for name in TOKENIZER_FILES:
            if (source.tokenizer / name).is_file():
                shutil.copyfile(source.tokenizer / name, folder / name)
        if source.reading:
            shutil.copyfile(source.reading / READING, folder / READING)
        else:
            side = config["vision_config"]["image_size"]
            _write_json(folder / READING, CLIP_READING | {"crop_size": side, "size": side})


def to_torch(source: Path, target: Path, vision: Path | None = None) -> None:
    """Write one of our folders as MiniMind2-V is published; its tower into the folder `vision`."""
    if not is_mlx(source):
        raise UserError(f"{source} is none of our checkpoint folders (see to-mlx)")
    ours = read_weights(source)
    published: dict[str, RawTensor] = {}
    for name, tensor in ours.items():
        found = to_published(name)
        if found is None:
            raise UserError(f"{source} holds a tensor {name} that MiniMind2-V has no place for")
        new, rule = found
        if rule.axes_back and len(tensor.shape) != len(rule.axes_back):
            raise UserError(f"{source}: tensor {name} has shape {tensor.shape}, not four axes")
        published[new] = tensor.permuted(rule.axes_back) if rule.axes_back else tensor
    state = {}
    for name in published_order(name for name in published if not _is_tower(name)):
        state[name] = published[name]
        if name == "model.norm.weight" and TIED[1] in published:
            state[TIED[0]] = published[TIED[1]]
    with ExitStack() as stack:
        file = stack.enter_context(appearing(target, folder=False))
        if vision:
            folder = stack.enter_context(appearing(vision, folder=True))
            _write_json(folder / "config.json", read_json(source / "config.json")["vision_config"])
            tower = {name: tensor for name, tensor in published.items() if _is_tower(name)}
            write_safetensors(folder / "model.safetensors", tower, "pt")
            if (source / READING).is_file():
                shutil.copyfile(source / READING, folder / READING)
        write_pth(file, state)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=4, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
