"""Writes a folder of ours, of a MiniMind-V or a LLaVA alike."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import DTYPES, LEARNED_FILE, Checkpoint
from .config import CONFIG, is_clip
from .families import published_layout
from .processor import CARRIED_FILES, PREPROCESSOR_CONFIG, TOKENIZER_FILES
from .reading.files import atomic_path, open_safetensors, write_json, write_safetensors
from .reading.tensors import FLOATS, RawTensor

CLIP_PREPROCESSOR = {  # openai/clip-vit-base-patch16's own
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}
SIGLIP_PREPROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}


def write_folder(
    checkpoint: Checkpoint, target: Path, dtype: str | None = None, source: str | None = None
) -> None:
    """Write a checkpoint as a folder of ours, in its own dtype or in `dtype`.

    `source` is the checkpoint's name or path as the user gave it, for the model card.
    The folder appears complete or not at all.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    if dtype:
        config, code = {**config, "torch_dtype": dtype}, DTYPES[dtype]
        tensors = {k: t.astype(code) if t.dtype in FLOATS else t for k, t in tensors.items()}
    with atomic_path(target, folder=True) as folder:
        write_json(folder / CONFIG, config)
        write_safetensors(folder / "model.safetensors", tensors, "mlx")
        copy_files(TOKENIZER_FILES, checkpoint.tokenizer_folder, folder)
        if checkpoint.carried_folder:
            copy_files(CARRIED_FILES, checkpoint.carried_folder, folder)
        write_learned(checkpoint.learned, checkpoint.learned_file, folder / LEARNED_FILE)
        if checkpoint.preprocessor_folder:
            copy_files([PREPROCESSOR_CONFIG], checkpoint.preprocessor_folder, folder)
        else:
            write_json(folder / PREPROCESSOR_CONFIG, _default_preprocessor(config["vision_config"]))
        card = _model_card(config, target.name, source)
        (folder / "README.md").write_text(card, encoding="utf-8")


def copy_files(names: Sequence[str], source: Path, target: Path) -> None:
    """Copy the files of these names that `source` has."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_learned(new: Mapping[str, RawTensor], old: Path | None, file: Path) -> None:
    """Write the weights of learned pruners, if any; new ones replace those of the same method."""
    if new:
        methods = {name.partition(".")[0] for name in new}
        kept = {
            name: tensor
            for name, tensor in (open_safetensors(old) if old else {}).items()
            if name.partition(".")[0] not in methods
        }
        write_safetensors(file, {**kept, **new}, "mlx")
    elif old:
        shutil.copyfile(old, file)


def _model_card(config: Mapping[str, Any], name: str, source: str | None) -> str:
    """A model card for the hub."""
    is_hub_name = source and source.count("/") == 1 and not Path(source).exists()
    base = f"base_model: {source}\n" if is_hub_name else ""
    quantization = config.get("quantization")
    few_bits = ""
    if quantization:
        parts = "language model and tower" if quantization.get("tower") else "language model"
        few_bits = f", its {parts} in {quantization['bits']} bits"
    title = published_layout(config, Path(name)).title
    title = title[0].upper() + title[1:]
    return (
        "---\nlibrary_name: mlx\npipeline_tag: image-text-to-text\n"
        f"{base}tags:\n- mlx\n- mlx_vlm_prune\n---\n\n# {name}\n\n"
        f"{title} in MLX format{few_bits}, for `mlx_vlm_prune`:\n\n```bash\n"
        f"mlx-vlm-prune generate --model {name} --image photo.jpg \\\n"
        '    --prompt "What is this?" --pruner divprune --keep-ratio 0.5\n```\n'
    )


def _default_preprocessor(vision: Mapping[str, Any]) -> dict[str, Any]:
    """The usual preprocessor_config.json of a tower with this vision_config."""
    side = vision["image_size"]
    if is_clip(vision):
        return CLIP_PREPROCESSOR | {"crop_size": side, "size": side}
    size = {"height": side, "width": side}
    return SIGLIP_PREPROCESSOR | {"do_center_crop": False, "size": size}
