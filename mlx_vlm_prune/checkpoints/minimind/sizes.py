"""The sizes of a MiniMind-V's language model, read off its tensors under our names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..reading.tensors import Shaped
from ..shapes import layer_count, matrix_shape
from .generations import Generation

MLP = "language.layers.0.mlp."


def text_config(
    tensors: Mapping[str, Shaped],
    generation: Generation,
    where: Path,
    heads: int | None,
    kv_heads: int | None,
) -> dict[str, Any]:
    """The language model's part of our config.json, `heads` and `kv_heads` as the user gave them.

    Without them MiniMind2's are assumed, since they are in no file (`Generation.kv_heads`).
    """
    vocab_size, hidden_size = matrix_shape(tensors, "language.embed_tokens.weight", where)
    q_rows, _ = matrix_shape(tensors, "language.layers.0.self_attn.q_proj.weight", where)
    k_rows, _ = matrix_shape(tensors, "language.layers.0.self_attn.k_proj.weight", where)
    if norm := tensors.get("language.layers.0.self_attn.k_norm.weight"):
        head_dim = norm.shape[0] if len(norm.shape) == 1 else 0
        kv_heads = k_rows // head_dim if head_dim else 0
    else:
        same_head_dim = max(1, k_rows * heads // max(1, q_rows)) if heads else None
        kv_heads = kv_heads or same_head_dim or generation.kv_heads or 1
        head_dim = k_rows // kv_heads
    heads = heads or (q_rows // head_dim if head_dim else 0)
    fits = head_dim and (kv_heads * head_dim, heads * head_dim) == (k_rows, q_rows)
    if not fits or q_rows != hidden_size or heads % kv_heads:
        raise UserError(
            f"{where}: {heads} heads and {kv_heads} key/value heads do not fit the shapes "
            f"(queries {q_rows}, keys {k_rows} rows); give heads=N and kv_heads=N"
        )
    return {
        "hidden_size": hidden_size,
        "max_position_embeddings": 32768,
        "num_attention_heads": heads,
        "num_hidden_layers": layer_count(tensors, r"language\.layers\.(\d+)\.", where),
        "num_key_value_heads": kv_heads,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "vocab_size": vocab_size,
        **generation.text_fields,
        **_mlp_sizes(tensors, generation, where),
    }


def _mlp_sizes(
    tensors: Mapping[str, Shaped], generation: Generation, where: Path
) -> dict[str, Any]:
    """Of one MLP a layer, or of a mixture of experts."""
    if MLP + "gate.weight" not in tensors:
        return {"intermediate_size": matrix_shape(tensors, MLP + "gate_proj.weight", where)[0]}
    sizes = {
        "intermediate_size": matrix_shape(tensors, MLP + "experts.0.gate_proj.weight", where)[0],
        "num_experts": matrix_shape(tensors, MLP + "gate.weight", where)[0],
        "num_experts_per_tok": generation.experts_per_tok,
    }
    pattern = re.compile(re.escape(MLP) + r"shared_experts\.\d+\.g")
    shared = sum(bool(pattern.match(name)) for name in tensors)
    return sizes | ({"n_shared_experts": shared} if shared else {})
