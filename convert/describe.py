"""`inspect`: what a checkpoint is, read off names and shapes; its tensors are not loaded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_vlm_prune.checkpoints.backbones import BACKBONES
from mlx_vlm_prune.checkpoints.config import (
    CONFIG,
    CLIPConfig,
    MiniMindConfig,
    MlxLmConfig,
    SiglipConfig,
    parse_config,
    parse_sizes,
    parse_text,
)
from mlx_vlm_prune.checkpoints.families import is_ours
from mlx_vlm_prune.checkpoints.llava import original
from mlx_vlm_prune.checkpoints.llava import published as llava
from mlx_vlm_prune.checkpoints.llava.layouts import LAYOUTS
from mlx_vlm_prune.checkpoints.llava.sizes import text_config
from mlx_vlm_prune.checkpoints.minimind.generations import DEFAULT, Generation
from mlx_vlm_prune.checkpoints.minimind.published import (
    Published,
    open_published,
    tokenizer_folder_beside,
)
from mlx_vlm_prune.checkpoints.mlx_vlm_folder import describe_mlx_vlm, is_mlx_vlm
from mlx_vlm_prune.checkpoints.processor import PREPROCESSOR_CONFIG, TOKENIZER
from mlx_vlm_prune.checkpoints.reading.fields import Fields
from mlx_vlm_prune.checkpoints.reading.files import read_json
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor
from mlx_vlm_prune.checkpoints.reading.weights import read_weights
from mlx_vlm_prune.checkpoints.shapes import expected_shapes

Lines = list[tuple[str, Any]]  # a heading, and its text, or the names that are missing
HEADS_ASSUMED = "assumed, as in every published MiniMind2: no file says it"


def describe(path: Path, vision: Path | None = None) -> Lines:
    """A few lines about a .pth, a folder as published or one of ours; raises UserError."""
    if is_mlx_vlm(path):
        lines, state = describe_mlx_vlm(path), read_weights(path)
    elif llava.is_llava_folder(path):
        state, tower_folder = original.read_state(path, vision)
        lines = _describe_llava(path, state, tower_folder)
    elif is_ours(path):
        state = read_weights(path)
        lines = _describe_ours(path, state)
    else:
        published = open_published(path, vision)
        lines, state = _describe_minimind(path, published), published.raw
    size = sum(tensor.nbytes for tensor in state.values())
    dtypes = sorted({tensor.dtype for tensor in state.values()})
    return [*lines, ("tensors", {"count": len(state), "bytes": size, "dtypes": dtypes})]


def as_text(lines: Lines, path: Path) -> str:
    """The lines as they are read by people."""
    return "\n".join([str(path), *(f"  {heading:<15} {_text(value)}" for heading, value in lines)])


def as_json(lines: Lines, path: Path) -> str:
    """The same for programs: a JSON object, its keys the headings."""
    values = {heading.replace(" ", "_"): value for heading, value in lines}
    return json.dumps({"path": str(path), **values}, indent=4, ensure_ascii=False)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['count']}, {value['bytes'] / 1e6:.1f} MB, {', '.join(value['dtypes'])}"
    return _first_names(value) if isinstance(value, list) else str(value)


def _describe_minimind(path: Path, published: Published) -> Lines:
    """A MiniMind-V as published; its tower may be missing."""
    generation, sizes = published.generation, published.sizes
    heads = "read off the norm of keys" if "qk_norm" in sizes["text_config"] else "from config.json"
    text = parse_text(Fields(sizes, path).part("text_config"))
    tower, missing = "not here: give its folder with --vision", []
    if "vision_config" in sizes:
        config = parse_sizes(sizes, path)
        tower = f"{_tower(config.vision)}, in {published.tower_folder or 'the file'}"
        missing = [name for name in expected_shapes(config) if name not in published.tensors]
    lines = [
        ("published as", f"{generation.title} ({generation.name})"),
        *_language_model(text, HEADS_ASSUMED if published.heads_assumed else heads),
        ("embeddings", _tie(published.raw, generation)),
        ("projector", _projector(published.tensors)),
        ("tower", tower),
    ]
    if not (tokenizer_folder_beside(path) / TOKENIZER).is_file():
        lines += [("tokenizer", "not here: give its folder with --tokenizer")]
    return [*lines, ("missing", missing)]


def _describe_llava(path: Path, state: dict[str, RawTensor], tower_folder: Path | None) -> Lines:
    """A LLaVA-style model as published, by its config.json; its tensors are compared with it."""
    if original.is_original_folder(path) and original.lacks_tower(state):
        return _describe_llava_without_tower(path)
    config, tensors = llava.config_and_tensors(state, path, tower_folder)
    layout, sizes = LAYOUTS[config["published_as"]], parse_sizes(config, path / CONFIG)
    folders = {PREPROCESSOR_CONFIG: tower_folder or path, TOKENIZER: path}
    missing = [name for name, folder in folders.items() if not (folder / name).is_file()]
    apart = f", in {tower_folder}" if tower_folder else ""
    return [
        ("published as", f"{layout.title} ({layout.name})"),
        *_language_model(sizes.text, "from config.json"),
        ("projector", _projector(tensors)),
        ("tower", f"{_tower(sizes.vision)}, features of layer {sizes.vision.depth}{apart}"),
        ("missing", missing),
    ]


def _describe_llava_without_tower(path: Path) -> Lines:
    """A LLaVA in its authors' layout, whose tower is not here."""
    file = path / CONFIG
    config = read_json(file)
    original.check_fields(config, file)
    text = text_config({**config, "model_type": "llama"}, config, file)
    return [
        ("published as", original.TITLE),
        *_language_model(parse_text(Fields(text, file, "text_config")), "from config.json"),
        ("tower", f"not here: give the folder of {config['mm_vision_tower']} with --vision"),
    ]


def _describe_ours(path: Path, state: dict[str, RawTensor]) -> Lines:
    """A folder of ours, of either family."""
    config = read_json(path / CONFIG)
    sizes = parse_config(config, path / CONFIG)
    lines = [
        ("made from", config.get("published_as", DEFAULT)),
        *_language_model(sizes.text, "from config.json"),
        ("projector", _projector(state)),
        ("tower", _tower(sizes.vision)),
    ]
    if q := sizes.quantization:
        parts = "the language model and the tower" if q.tower else "the language model"
        text = f"{q.bits} bits, groups of {q.group_size}, {q.mode}, {parts}"
        lines += [("quantized", text)]
    missing = [name for name in expected_shapes(sizes) if name not in state]
    missing += [n for n in (PREPROCESSOR_CONFIG, TOKENIZER) if not (path / n).is_file()]
    return [*lines, ("missing", missing)]


def _language_model(text: MiniMindConfig | MlxLmConfig, heads_source: str) -> Lines:
    """`heads_source`: where the number of heads comes from."""
    if isinstance(text, MlxLmConfig):
        kind = f"{BACKBONES[text.model_type].title}, computed by mlx-lm"
    else:
        kind = "Qwen3-like, q/k norm" if text.qk_norm else "Llama-like"
        kind = "Qwen2-like, biases" if text.attention_bias else kind
    lines = [("language model", f"{text.num_hidden_layers} layers of {text.hidden_size}, {kind}")]
    if heads := text.num_attention_heads:
        kv_heads = text.num_key_value_heads
        lines += [("heads", f"{heads}, and {kv_heads} for keys and values ({heads_source})")]
    lines += [("vocabulary", str(text.vocab_size))]
    if isinstance(text, MiniMindConfig) and text.num_experts:
        shared = text.n_shared_experts
        reads_all = f", and {shared} that reads all" if shared else ""
        chosen = f"{text.num_experts_per_tok} of {text.num_experts} a token"
        lines += [("experts", chosen + reads_all)]
    return lines


def _tie(state: Mapping[str, RawTensor], generation: Generation) -> str:
    has_head, has_embedding = (name in state for name in generation.tied)
    if not has_embedding:
        return "missing"
    return f"tied to the output layer, stored {'twice' if has_head else 'once'}"


def _projector(tensors: Mapping[str, RawTensor]) -> str:
    if weight := tensors.get("projector.weight"):
        queries = tensors.get("pruner.queries")
        pooled = f", attention_pool to {queries.shape[0]} tokens" if queries else ""
        return f"linear, {weight.shape[1]} to {weight.shape[0]}" + pooled
    if weight := tensors.get("projector.fc1.weight"):
        norm = "norm and " if "projector.norm.weight" in tensors else ""
        return f"{norm}two layers, {weight.shape[1]} to {weight.shape[0]}"
    return "missing"


def _tower(c: CLIPConfig) -> str:
    kind = "SigLIP" if isinstance(c, SiglipConfig) else "CLIP"
    rows, columns = c.grid
    return (
        f"{kind}, {c.num_hidden_layers} layers of {c.hidden_size}, "
        f"{rows} x {columns} patches of {c.patch_size} pixels"
    )


def _first_names(names: list[str]) -> str:
    """At most five of them."""
    shown = ", ".join(names[:5])
    return (f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown) or "nothing"
