"""Which model a state dict holds, and its sizes, read off the tensors.

MiniMind-V has had several generations whose weights look alike and mean different
things; loading one as another gives nonsense without an error. So each is told by
its names, and those that are not supported are refused by name.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import RawTensor
from .names import TIED, to_ours

Tensors = Mapping[str, RawTensor]
KV_HEADS = 2  # of every published MiniMind2; the number is in no file
SUPPORTED = "supported is MiniMind2-V as released since 27 April 2025, dense, with CLIP"
IMAGE_TOKEN = "@"
# Left out of a CLIP folder: buffers, and the half that reads text.
CLIP_REST = re.compile(
    r"vision_model\.embeddings\.position_ids|text_model\..*|(text|visual)_projection\..*|logit_scale"
)


def tidy(state: Tensors, where: Path) -> dict[str, RawTensor]:
    """A MiniMind2-V state dict without masks, its tower under CLIP's names, its tie undone.

    Raises UserError for another generation, or where output layer and embedding differ.
    """
    kept = {k.removeprefix("vision_encoder."): v for k, v in state.items() if "mask" not in k}
    if "embeddings.class_embedding" in kept:  # a CLIPVisionModel as transformers 5 saves it
        kept = {f"vision_model.{name}": tensor for name, tensor in kept.items()}
    kept = {k: v for k, v in kept.items() if not CLIP_REST.fullmatch(k)}
    if other := generation(kept):
        raise UserError(f"{where} holds {other}; {SUPPORTED}")
    head, embedding = (kept.get(name) for name in TIED)
    if head is not None and embedding is not None and head != embedding:
        raise UserError(f"{where}: lm_head.weight differs from the embedding it should be tied to")
    kept.pop(TIED[0], None)
    return kept


def generation(names: Tensors) -> str | None:
    """What else than the supported generation this is, in words; None if it is none of these."""
    if any(re.search(r"\.mlp\.(gate\.weight|experts\.|shared_experts\.)", n) for n in names):
        return "a mixture of experts (MoE)"
    if any(n.startswith("vision_proj.mlp.") or n.endswith("q_norm.weight") for n in names):
        return "a MiniMind-3 model (SigLIP tower, normalised queries)"
    if "tok_embeddings.weight" in names:
        return "an early MiniMind-V (before 27 April 2025: interleaved rotation)"
    return None


def text_config(
    state: Tensors, where: Path, heads: int | None = None, kv_heads: int | None = None
) -> dict[str, Any]:
    """The language model's sizes. Heads are in no file: KV_HEADS is assumed unless given."""
    vocab, hidden = _matrix(state, "model.embed_tokens.weight", where)
    layers = _layers(state, r"model\.layers\.(\d+)\.", where)
    prefix = "model.layers.0."
    q_rows, _ = _matrix(state, prefix + "self_attn.q_proj.weight", where)
    k_rows, _ = _matrix(state, prefix + "self_attn.k_proj.weight", where)
    inner, _ = _matrix(state, prefix + "mlp.gate_proj.weight", where)
    kv_heads = kv_heads or (KV_HEADS if not heads else max(1, k_rows * heads // max(1, q_rows)))
    head_dim = k_rows // kv_heads
    heads = heads or (q_rows // head_dim if head_dim else 0)
    if (
        not head_dim
        or kv_heads * head_dim != k_rows
        or heads * head_dim != q_rows
        or q_rows != hidden
    ):
        raise UserError(
            f"{where}: {heads} heads and {kv_heads} key/value heads do not fit the shapes "
            f"(queries {q_rows}, keys {k_rows} rows); give --heads and --kv-heads"
        )
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "max_position_embeddings": 32768,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "vocab_size": vocab,
    }


def vision_config(state: Tensors, given: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The tower's sizes from its tensors; heads and the rest from CLIP's config.json.

    Where config.json names a size, it must be the tensors'. It may be a whole CLIP's.
    """
    given = given.get("vision_config", given)
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: vision_config must be an object")
    patches = _tensor(state, "vision_model.embeddings.patch_embedding.weight", where).shape
    if len(patches) != 4:
        raise UserError(f"{where}: the patch embedding has shape {patches}, not four axes")
    rows, width = _matrix(state, "vision_model.embeddings.position_embedding.weight", where)
    inner, _ = _matrix(state, "vision_model.encoder.layers.0.mlp.fc1.weight", where)
    side = round((rows - 1) ** 0.5)
    measured = {
        "hidden_size": width,
        "image_size": side * patches[2],
        "intermediate_size": inner,
        "num_hidden_layers": _layers(state, r"vision_model\.encoder\.layers\.(\d+)\.", where),
        "patch_size": patches[2],
    }
    for name, size in measured.items():
        if given.get(name, size) != size:
            raise UserError(
                f"{where}: config.json says {name} {given[name]!r}, but its tensors say {size}"
            )
    activation = given.get("hidden_act", "quick_gelu")
    if activation != "quick_gelu":
        raise UserError(f"{where}: hidden_act is {activation!r}; OpenAI's CLIP has quick_gelu")
    return {
        **measured,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": given.get("layer_norm_eps", 1e-05),
        "model_type": "clip_vision_model",
        "num_attention_heads": given.get("num_attention_heads", max(1, width // 64)),
    }


def our_tensors(state: Tensors, where: Path) -> dict[str, RawTensor]:
    """Every tensor under our name, its axes in our order; UserError where one has no place."""
    ours: dict[str, RawTensor] = {}
    for name, tensor in state.items():
        found = to_ours(name)
        if found is None:
            raise UserError(f"{where} holds a tensor {name} that MiniMind2-V has no place for")
        new, rule = found
        if tensor.dtype not in ("F32", "F16", "BF16"):
            raise UserError(f"{where}: tensor {name} is {tensor.dtype}; F32, F16 or BF16 is needed")
        if rule.axes and len(tensor.shape) != len(rule.axes):
            raise UserError(f"{where}: tensor {name} has shape {tensor.shape}, not four axes")
        ours[new] = tensor.permuted(rule.axes) if rule.axes else tensor
    return ours


def _tensor(state: Tensors, name: str, where: Path) -> RawTensor:
    if name not in state:
        raise UserError(f"{where} lacks the tensor {name}; {SUPPORTED}")
    return state[name]


def _matrix(state: Tensors, name: str, where: Path) -> tuple[int, int]:
    shape = _tensor(state, name, where).shape
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{where}: tensor {name} has shape {shape}; it must be a matrix")
    return shape[0], shape[1]


def _layers(state: Tensors, pattern: str, where: Path) -> int:
    numbers = {int(found[1]) for name in state if (found := re.match(pattern, name))}
    if numbers != set(range(len(numbers))):
        missing = min(set(range(len(numbers))) - numbers)
        raise UserError(f"{where} has layers up to {max(numbers)}, but lacks layer {missing}")
    return len(numbers)
