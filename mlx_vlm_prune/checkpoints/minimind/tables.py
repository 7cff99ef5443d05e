"""Tensor names of MiniMind-V's language model and projector, published (left) and ours."""

from ..names.rules import Rule, same_names
from ..names.value_order import INTERLEAVED

LLAMA = (  # MiniMind2 since April 2025 and MiniMind-3: as Hugging Face's Llama, Qwen3, Qwen3Moe
    *same_names("model", "language", "embed_tokens.weight"),
    *same_names(
        "model.layers.*",
        "language.layers.*",
        "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight "
        "self_attn.o_proj.weight self_attn.q_norm.weight self_attn.k_norm.weight "
        "input_layernorm.weight post_attention_layernorm.weight "
        "mlp.gate_proj.weight mlp.down_proj.weight mlp.up_proj.weight mlp.gate.weight "
        "mlp.experts.*.gate_proj.weight mlp.experts.*.down_proj.weight "
        "mlp.experts.*.up_proj.weight mlp.shared_experts.*.gate_proj.weight "
        "mlp.shared_experts.*.down_proj.weight mlp.shared_experts.*.up_proj.weight",
    ),
    *same_names("model", "language", "norm.weight"),
)
_EARLY_LAYER = {
    "attention.wq": ("self_attn.q_proj", INTERLEAVED),
    "attention.wk": ("self_attn.k_proj", INTERLEAVED),
    "attention.wv": ("self_attn.v_proj", None),
    "attention.wo": ("self_attn.o_proj", None),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
    "feed_forward.gate": ("mlp.gate", None),
}
_EARLY_MLP = {
    "feed_forward": "mlp",
    "feed_forward.experts.*": "mlp.experts.*",
    "feed_forward.shared_experts": "mlp.shared_experts.0",
}
EARLY = (  # MiniMind2 from February to April 2025
    Rule("tok_embeddings.weight", "language.embed_tokens.weight"),
    *[
        Rule(f"layers.*.{theirs}.weight", f"language.layers.*.{ours}.weight", change)
        for theirs, (ours, change) in _EARLY_LAYER.items()
    ],
    *[
        Rule(f"layers.*.{theirs}.w{n}.weight", f"language.layers.*.{ours}.{name}_proj.weight")
        for theirs, ours in _EARLY_MLP.items()
        for n, name in ((1, "gate"), (2, "down"), (3, "up"))
    ],
    Rule("norm.weight", "language.norm.weight"),
)
LINEAR = (
    *same_names("vision_proj.vision_proj.0", "projector", "weight bias"),
    Rule("vision_proj.pool_queries", "pruner.queries"),  # EfficientVLM's learned pooling
    *[
        Rule(f"vision_proj.pool_{x}_proj.{kind}", f"pruner.{x}_proj.{kind}")
        for x in "qkv"
        for kind in ("weight", "bias")
    ],
)
MLP = (
    *same_names("vision_proj.mlp.0", "projector.fc1", "weight bias"),
    *same_names("vision_proj.mlp.2", "projector.fc2", "weight bias"),
)
NORMED_MLP = (
    *same_names("vision_proj.mlp.0", "projector.norm", "weight bias"),
    *same_names("vision_proj.mlp.1", "projector.fc1", "weight bias"),
    *same_names("vision_proj.mlp.3", "projector.fc2", "weight bias"),
)
