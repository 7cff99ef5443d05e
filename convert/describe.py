"""What a checkpoint is, read off names and shapes: its tensors are not loaded."""

from collections.abc import Mapping
from pathlib import Path

from mlx_vlm_prune.checkpoints import mlx_vlm_folder as elsewhere
from mlx_vlm_prune.checkpoints.backbones import BACKBONES
from mlx_vlm_prune.checkpoints.checkpoint import Published, is_ours, open_published
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
from mlx_vlm_prune.checkpoints.llava import composed as llava
from mlx_vlm_prune.checkpoints.llava import original as llava_original
from mlx_vlm_prune.checkpoints.minimind.generations import Generation
from mlx_vlm_prune.checkpoints.processor import READING, TOKENIZER
from mlx_vlm_prune.checkpoints.reading.fields import Fields
from mlx_vlm_prune.checkpoints.reading.files import read_json
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor
from mlx_vlm_prune.checkpoints.reading.weights import read_weights
from mlx_vlm_prune.checkpoints.shapes import expected_shapes

Lines = list[tuple[str, str]]
HEADS = "assumed, as in every published MiniMind2: no file says it"


def describe(path: Path, vision: Path | None = None) -> str:
    """A few lines about a .pth, a folder as published or one of ours; raises UserError."""
    if elsewhere.is_one(path):
        lines, state = elsewhere.lines(path), read_weights(path)
    elif llava.is_published(path):
        state, tower = llava_original.parts(path, vision)
        lines = _composed(path, state, tower)
    elif is_ours(path):
        state = read_weights(path)
        lines = _ours(path, state)
    else:
        published = open_published(path, vision)
        lines, state = _published(path, published), published.raw
    size = sum(tensor.nbytes for tensor in state.values())
    kinds = sorted({tensor.dtype for tensor in state.values()})
    lines += [("tensors", f"{len(state)}, {size / 1e6:.1f} MB, {', '.join(kinds)}")]
    return "\n".join([str(path), *(f"  {name:<15} {text}" for name, text in lines)])


def _published(path: Path, published: Published) -> Lines:
    generation, sizes = published.generation, published.sizes
    why = "read off the norm of keys" if "qk_norm" in sizes["text_config"] else "from config.json"
    text = parse_text(Fields(sizes, path).part("text_config"))
    tower, missing = "not here: give its folder with --vision", []
    if "vision_config" in sizes:
        config = parse_sizes(sizes, path)
        tower = f"{_tower(config.vision)}, in {published.tower or 'the file'}"
        missing = [name for name in expected_shapes(config) if name not in published.tensors]
    lines = [
        ("published as", f"{generation.title} ({generation.name})"),
        *_language(text, HEADS if published.guessed else why),
        ("embeddings", _tie(published.raw, generation)),
        ("projector", _projector(published.tensors)),
        ("tower", tower),
    ]
    if not ((path if path.is_dir() else path.parent) / TOKENIZER).is_file():
        lines += [("tokenizer", "not here: give its folder with --tokenizer")]
    return [*lines, ("missing", _few(missing))]


def _composed(path: Path, state: dict[str, RawTensor], tower: Path | None) -> Lines:
    """A LLaVA-style model, by config.json; its tensors are held against it."""
    if llava_original.is_one(path) and llava_original.lacks_tower(state):
        return _without_tower(path)
    config, named = llava.composed(state, path, tower)
    layout, sizes = llava.LAYOUTS[config["published_as"]], parse_sizes(config, path / CONFIG)
    places = {READING: tower or path, TOKENIZER: path}
    files = [name for name, place in places.items() if not (place / name).is_file()]
    apart = f", in {tower}" if tower else ""
    return [
        ("published as", f"{layout.title} ({layout.name})"),
        *_language(sizes.text, "from config.json"),
        ("projector", _projector(named)),
        ("tower", f"{_tower(sizes.vision)}, features of layer {sizes.vision.depth}{apart}"),
        ("missing", _few(files)),
    ]


def _without_tower(path: Path) -> Lines:
    """A LLaVA in its authors' layout, whose tower is elsewhere."""
    file = path / CONFIG
    told = read_json(file)
    llava_original.check(told, file)
    text = llava.text_config({**told, "model_type": "llama"}, told, file)
    return [
        ("published as", llava_original.TITLE),
        *_language(parse_text(Fields(text, file, "text_config")), "from config.json"),
        ("tower", f"not here: give the folder of {told['mm_vision_tower']} with --vision"),
    ]


def _ours(path: Path, state: dict[str, RawTensor]) -> Lines:
    whole = read_json(path / CONFIG)
    config = parse_config(whole, path / CONFIG)
    lines = [
        ("made from", whole.get("published_as", "minimind2-v")),
        *_language(config.text, "from config.json"),
        ("projector", _projector(state)),
        ("tower", _tower(config.vision)),
    ]
    if how := config.quantization:
        text = f"{how.bits} bits, groups of {how.group_size}, {how.mode}, the language model"
        lines += [("quantized", text)]
    missing = [name for name in expected_shapes(config) if name not in state]
    missing += [name for name in (READING, TOKENIZER) if not (path / name).is_file()]
    return [*lines, ("missing", _few(missing))]


def _language(text: MiniMindConfig | MlxLmConfig, why: str) -> Lines:
    if isinstance(text, MlxLmConfig):
        kind = f"{BACKBONES[text.model_type].title}, computed by mlx-lm"
    else:
        kind = "Qwen3-like, q/k norm" if text.qk_norm else "Llama-like"
        kind = "Qwen2-like, biases" if text.attention_bias else kind
    deep = f"{text.num_hidden_layers} layers of {text.hidden_size}, {kind}"
    lines = [("language model", deep), ("vocabulary", str(text.vocab_size))]
    if heads := text.num_attention_heads:
        groups = text.num_key_value_heads
        lines.insert(1, ("heads", f"{heads}, and {groups} for keys and values ({why})"))
    if isinstance(text, MiniMindConfig) and text.num_experts:
        shared = text.n_shared_experts
        more = f", and {shared} that reads all" if shared else ""
        chosen = f"{text.num_experts_per_tok} of {text.num_experts} a token"
        lines += [("experts", chosen + more)]
    return lines


def _tie(rest: Mapping[str, RawTensor], generation: Generation) -> str:
    both = [name in rest for name in generation.tied]
    if all(both):
        return "tied to the output layer, stored twice"
    return "tied to the output layer, stored once" if both[1] else "missing"


def _projector(named: Mapping[str, RawTensor]) -> str:
    if weight := named.get("projector.weight"):
        queries = named.get("pruner.queries")
        pooled = f", attention_pool to {queries.shape[0]} tokens" if queries else ""
        return f"linear, {weight.shape[1]} to {weight.shape[0]}" + pooled
    if weight := named.get("projector.fc1.weight"):
        norm = "norm and " if "projector.norm.weight" in named else ""
        return f"{norm}two layers, {weight.shape[1]} to {weight.shape[0]}"
    return "missing"


def _tower(c: CLIPConfig) -> str:
    kind, (rows, columns) = "SigLIP" if isinstance(c, SiglipConfig) else "CLIP", c.grid
    return (
        f"{kind}, {c.num_hidden_layers} layers of {c.hidden_size}, "
        f"{rows} x {columns} patches of {c.patch_size} pixels"
    )


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return (f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown) or "nothing"
