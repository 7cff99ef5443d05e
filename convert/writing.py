"""Checkpoints whole, as they are written: ours, as published, and for transformers.

Each appears complete or not at all.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_vlm_prune.checkpoints.checkpoint import (
    DTYPES,
    LEARNED,
    Source,
    is_composed,
    is_tower,
    published_as,
    read_ours,
)
from mlx_vlm_prune.checkpoints.config import CONFIG, VLMConfig, is_clip
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.llava import composed as llava
from mlx_vlm_prune.checkpoints.llava import original as llava_original
from mlx_vlm_prune.checkpoints.names.renaming import as_published
from mlx_vlm_prune.checkpoints.names.tables import LLAMA, to_published
from mlx_vlm_prune.checkpoints.processor import CARRIED, READING, TOKENIZER_FILES
from mlx_vlm_prune.checkpoints.reading.files import (
    appearing,
    open_safetensors,
    read_json,
    write_json,
    write_safetensors,
)
from mlx_vlm_prune.checkpoints.reading.pth import write_pth
from mlx_vlm_prune.checkpoints.reading.tensors import FLOATS, RawTensor

CLIP_READING = {  # openai/clip-vit-base-patch16's own
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}
SIGLIP_READING = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}


def to_mlx(source: Source, target: Path, dtype: str | None = None, name: str | None = None) -> None:
    """Write one of our folders, in the source's own precision or in `dtype`.

    `name` is the source's, as the user gave it, for the model card.
    """
    config, tensors = source.config, source.tensors
    if dtype:
        config = {**config, "torch_dtype": dtype}
        code = DTYPES[dtype]
        narrow = {k: t.astype(code) if t.dtype in FLOATS else t for k, t in tensors.items()}
        source = replace(source, config=config, tensors=narrow)
    with appearing(target, folder=True) as folder:
        write_json(folder / CONFIG, config)
        write_safetensors(folder / "model.safetensors", source.tensors, "mlx")
        copy_files(TOKENIZER_FILES, source.tokenizer, folder)
        if source.beside:
            copy_files(CARRIED, source.beside, folder)
        if source.twig:
            held = open_safetensors(source.learned) if source.learned else {}
            others = {k: tensor for k, tensor in held.items() if not k.startswith("twig.")}
            write_safetensors(folder / LEARNED, {**others, **source.twig}, "mlx")
        elif source.learned:
            shutil.copyfile(source.learned, folder / LEARNED)
        if source.reading:
            shutil.copyfile(source.reading / READING, folder / READING)
        else:
            write_json(folder / READING, _assumed_reading(config["vision_config"]))
        (folder / "README.md").write_text(_card(config, target.name, name), encoding="utf-8")


def _card(config: Mapping[str, Any], name: str, source: str | None) -> str:
    """A model card for the hub."""
    origin = source if source and source.count("/") == 1 and not Path(source).exists() else None
    base = f"base_model: {origin}\n" if origin else ""
    how = config.get("quantization")
    fewer = f", its language model in {how['bits']} bits" if how else ""
    title = published_as(config, Path(name)).title
    title = title[0].upper() + title[1:]
    return (
        "---\nlibrary_name: mlx\npipeline_tag: image-text-to-text\n"
        f"{base}tags:\n- mlx\n- mlx_vlm_prune\n---\n\n# {name}\n\n"
        f"{title} in MLX format{fewer}, for `mlx_vlm_prune`:\n\n```bash\n"
        f"python -m mlx_vlm_prune.generate --model {name} --image photo.jpg \\\n"
        '    --prompt "What is this?" --pruner divprune --keep-ratio 0.5\n```\n'
    )


def copy_files(names: Sequence[str], source: Path, target: Path) -> None:
    """Those that are there, from folder to folder."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _assumed_reading(vision: Mapping[str, Any]) -> dict[str, Any]:
    side = vision["image_size"]
    if is_clip(vision):
        return CLIP_READING | {"crop_size": side, "size": side}
    size = {"height": side, "width": side}
    return SIGLIP_READING | {"do_center_crop": False, "size": size}


def to_torch(source: Path, target: Path, vision: Path | None = None) -> None:
    """Write one of our folders as it was published; its tower into the folder `vision`."""
    config, sizes, ours = read_ours(source)
    if is_composed(config):
        return _composed_to_torch(source, target, vision, config, ours)
    generation = published_as(config, source)
    published = as_published(ours, generation.table, sizes.text.head_dim, source)
    state: dict[str, RawTensor] = {}
    head, embedding = generation.tied
    last = to_published(generation.language, "language.norm.weight")
    for name, tensor in published.items():
        if not is_tower(name):
            state[name] = tensor
        if last and name == last[0] and embedding in published:  # the output layer's place
            state[head] = published[embedding]
    with ExitStack() as stack:
        file = stack.enter_context(appearing(target))
        if vision:
            folder = stack.enter_context(appearing(vision, folder=True))
            _write_tower(source, folder, config, published)
        write_pth(file, state)


def _write_tower(
    source: Path, folder: Path, config: Mapping[str, Any], published: Mapping[str, RawTensor]
) -> None:
    tower = {name: tensor for name, tensor in published.items() if is_tower(name)}
    _fill(folder, _tower_config(config["vision_config"]), tower, [READING], source)


def _composed_to_torch(
    source: Path,
    target: Path,
    vision: Path | None,
    config: Mapping[str, Any],
    ours: Mapping[str, RawTensor],
) -> None:
    """A LLaVA-style model as it was published: whole, or its tower in a folder of its own."""
    told, layout = llava.published_config(config, source), published_as(config, source)
    state = llava.published(ours, layout, config, source)
    inside = not any(is_tower(name) for name in state)
    if inside and vision:
        raise UserError(f"{source} was published with its tower inside; leave out --vision")
    rest = {name: tensor for name, tensor in state.items() if not is_tower(name)}
    with ExitStack() as stack:
        folder = stack.enter_context(appearing(target, folder=True))
        if vision:
            _write_tower(source, stack.enter_context(appearing(vision, folder=True)), config, state)
        names = [*TOKENIZER_FILES, *CARRIED, *([READING] if inside else [])]
        _fill(folder, told, rest, names, source)


def _composed_to_hf(
    source: Path,
    target: Path,
    config: Mapping[str, Any],
    sizes: VLMConfig,
    ours: Mapping[str, RawTensor],
) -> None:
    """A LLaVA-style model for transformers: tower, projector and language model."""
    published = llava.published_config(config, source)
    if not llava_original.is_original(published):
        return _composed_to_torch(source, target, None, config, ours)
    told = llava_original.for_transformers(config, sizes, source)
    state = llava.published(ours, llava.LAYOUTS["llava-hf"], config, source)
    with appearing(target, folder=True) as folder:
        _fill(folder, told, state, [*TOKENIZER_FILES, *CARRIED], source)
        if (source / READING).is_file():
            square = {"do_pad": True, "image_processor_type": "LlavaImageProcessor"}
            pads = llava_original.pads(published)
            write_json(folder / READING, read_json(source / READING) | (square if pads else {}))


def _tower_config(vision: Mapping[str, Any]) -> dict[str, Any]:
    """As Hugging Face writes it; SigLIP's pooling head is left out, as MiniMind-V does."""
    if is_clip(vision):
        return {name: value for name, value in vision.items() if name != "feature_layers"}
    told = {**vision, "vision_use_head": False}
    if vision["model_type"] == "siglip2_vision_model":
        told["num_patches"] = (told.pop("image_size") // vision["patch_size"]) ** 2
    return told


def _fill(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, RawTensor],
    names: Sequence[str],
    source: Path,
) -> None:
    """A folder as transformers writes it, so that what it wrote comes back the same."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    write_safetensors(folder / "model.safetensors", tensors, "pt")
    copy_files(names, source, folder)


def to_hf(source: Path, target: Path) -> str:
    """Write the language model of one of our folders for transformers; its class's name.

    Raises UserError where transformers has no class that computes the same.
    """
    config, sizes, ours = read_ours(source)
    if is_composed(config):
        _composed_to_hf(source, target, config, sizes, ours)
        return llava.READER
    generation, text = published_as(config, source), config["text_config"]
    reader = generation.readers.get("experts" if text.get("num_experts") else "dense")
    if reader is None:
        raise UserError(
            f"{source}: transformers has no class for {generation.title} with a mixture of experts"
        )
    words = {name: tensor for name, tensor in ours.items() if name.startswith("language.")}
    state = as_published(words, LLAMA, sizes.text.head_dim, source)
    with appearing(target, folder=True) as folder:
        told = _hf_config(reader, config, sizes.text.head_dim)
        _fill(folder, told, state, TOKENIZER_FILES, source)
    return reader


def _hf_config(reader: str, config: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    text = {k: v for k, v in config["text_config"].items() if k != "qk_norm"}
    told: dict[str, Any] = {
        **text,
        "architectures": [reader],
        "attention_bias": False,
        "eos_token_id": config.get("eos_token_id"),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "model_type": {"L": "llama", "Q": "qwen3"}[reader[0]],
        "torch_dtype": config.get("torch_dtype", "float32"),
    }
    if text.get("num_experts"):
        inner = text["intermediate_size"]
        told |= {"model_type": "qwen3_moe", "moe_intermediate_size": inner}
        told |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    return told
