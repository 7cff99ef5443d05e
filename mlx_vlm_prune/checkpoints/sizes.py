"""The sizes of a checkpoint, read off its tensors, which are under our names here."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import TOWERS
from .errors import UserError
from .minimind.generations import Generation, Shaped
from .names.renaming import Tensors
from .reading.tensors import RawTensor

# Left out of a tower's folder: buffers, the half that reads text, and SigLIP's pooling head,
# which no MiniMind-V uses.
TOWER_REST = re.compile(
    r"vision_model\.(embeddings\.position_ids|head\..*)|text_model\..*"
    r"|(text|visual)_projection\..*|logit_scale|logit_bias"
)


def tidy(state: Tensors) -> dict[str, RawTensor]:
    """A state dict without masks, its tower under Hugging Face's names."""
    kept = {k.removeprefix("vision_encoder."): v for k, v in state.items() if "mask" not in k}
    if "embeddings.patch_embedding.weight" in kept:  # a tower alone, as transformers 5 saves it
        kept = {f"vision_model.{name}": tensor for name, tensor in kept.items()}
    return {k: v for k, v in kept.items() if not TOWER_REST.fullmatch(k)}


def text_config(
    state: Mapping[str, Shaped],
    generation: Generation,
    where: Path,
    heads: int | None,
    kv_heads: int | None,
) -> dict[str, Any]:
    """The language model's sizes. MiniMind2's heads are in no file: KV_HEADS is assumed."""
    vocab, hidden = _matrix(state, "language.embed_tokens.weight", where)
    q_rows, _ = _matrix(state, "language.layers.0.self_attn.q_proj.weight", where)
    k_rows, _ = _matrix(state, "language.layers.0.self_attn.k_proj.weight", where)
    if norm := state.get("language.layers.0.self_attn.k_norm.weight"):
        head_dim = norm.shape[0] if len(norm.shape) == 1 else 0
        kv_heads = k_rows // head_dim if head_dim else 0
    else:
        whole = max(1, k_rows * heads // max(1, q_rows)) if heads else generation.kv_heads or 1
        kv_heads = kv_heads or whole
        head_dim = k_rows // kv_heads
    heads = heads or (q_rows // head_dim if head_dim else 0)
    fits = head_dim and (kv_heads * head_dim, heads * head_dim) == (k_rows, q_rows)
    if not fits or q_rows != hidden or heads % kv_heads:
        raise UserError(
            f"{where}: {heads} heads and {kv_heads} key/value heads do not fit the shapes "
            f"(queries {q_rows}, keys {k_rows} rows); give --heads and --kv-heads"
        )
    return {
        "hidden_size": hidden,
        "max_position_embeddings": 32768,
        "num_attention_heads": heads,
        "num_hidden_layers": _layers(state, r"language\.layers\.(\d+)\.", where),
        "num_key_value_heads": kv_heads,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "vocab_size": vocab,
        **generation.text,
        **_mlp_sizes(state, generation, where),
    }


def _mlp_sizes(state: Mapping[str, Shaped], generation: Generation, where: Path) -> dict[str, Any]:
    mlp = "language.layers.0.mlp."
    if mlp + "gate.weight" not in state:
        return {"intermediate_size": _matrix(state, mlp + "gate_proj.weight", where)[0]}
    sizes = {
        "intermediate_size": _matrix(state, mlp + "experts.0.gate_proj.weight", where)[0],
        "num_experts": _matrix(state, mlp + "gate.weight", where)[0],
        "num_experts_per_tok": generation.experts_per_tok,
    }
    shared = {name for name in state if re.match(re.escape(mlp) + r"shared_experts\.\d+\.g", name)}
    return sizes | ({"n_shared_experts": len(shared)} if shared else {})


def vision_config(
    state: Mapping[str, Shaped], tower_type: str, given: Mapping[str, Any], where: Path
) -> dict[str, Any]:
    """The tower's sizes from its tensors; heads and the rest from its folder's config.json.

    Where config.json names a size, it must be the tensors'. It may be a whole CLIP's or SigLIP's.
    """
    patches = _tensor(state, "tower.embeddings.patch_embedding.weight", where).shape
    rows, width = _matrix(state, "tower.embeddings.position_embedding.weight", where)
    inner, _ = _matrix(state, "tower.encoder.layers.0.mlp.fc1.weight", where)
    clip = tower_type == TOWERS[0]
    measured = {
        "hidden_size": width,
        "image_size": round((rows - clip) ** 0.5) * patches[1],
        "intermediate_size": inner,
        "num_hidden_layers": _layers(state, r"tower\.encoder\.layers\.(\d+)\.", where),
        "patch_size": patches[1],
    }
    given = given.get("vision_config", given)
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: vision_config must be an object")
    naflex = tower_type == "siglip2_vision_model"
    for name, size in measured.items():
        if given.get(name, size) != size and not (naflex and name == "image_size"):
            raise UserError(
                f"{where}: config.json says {name} {given[name]!r}, but its tensors say {size}"
            )
    kind, right = ("OpenAI's CLIP", "quick_gelu") if clip else ("SigLIP", "gelu_pytorch_tanh")
    if given.get("hidden_act", right) != right:
        raise UserError(f"{where}: hidden_act is {given['hidden_act']!r}; {kind} has {right}")
    return {
        **measured,
        "hidden_act": right,
        "layer_norm_eps": given.get("layer_norm_eps", 1e-05 if clip else 1e-06),
        "model_type": tower_type,
        "num_attention_heads": given.get("num_attention_heads", max(1, width // 64)),
    }


def _tensor(state: Mapping[str, Shaped], name: str, where: Path) -> Shaped:
    if name not in state:
        raise UserError(f"{where} lacks the tensor {name}")
    return state[name]


def _matrix(state: Mapping[str, Shaped], name: str, where: Path) -> tuple[int, int]:
    shape = _tensor(state, name, where).shape
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{where}: tensor {name} has shape {shape}; it must be a matrix")
    return shape[0], shape[1]


def _layers(state: Mapping[str, Shaped], pattern: str, where: Path) -> int:
    numbers = {int(found[1]) for name in state if (found := re.match(pattern, name))}
    if numbers != set(range(len(numbers))):
        missing = min(set(range(len(numbers))) - numbers)
        raise UserError(f"{where} has layers up to {max(numbers)}, but lacks layer {missing}")
    return len(numbers)
