"""Tensor names of vision towers in Hugging Face's layout (left) and ours."""

from .rules import Rule, same_names, weights_and_biases
from .value_order import CONVOLUTION, PATCHES

_PATCH = "embeddings.patch_embedding.weight"
_LAYERS = same_names(
    "vision_model.encoder.layers.*",
    "tower.encoder.layers.*",
    weights_and_biases(
        "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj "
        "layer_norm1 mlp.fc1 mlp.fc2 layer_norm2"
    ),
)
CLIP = (
    *same_names("vision_model", "tower", "embeddings.class_embedding"),
    Rule(f"vision_model.{_PATCH}", f"tower.{_PATCH}", CONVOLUTION),
    *same_names("vision_model", "tower", "embeddings.position_embedding.weight"),
    *same_names("vision_model", "tower", weights_and_biases("pre_layrnorm")),  # sic
    *_LAYERS,
    *same_names("vision_model", "tower", weights_and_biases("post_layernorm")),
)
_SIGLIP_REST = (
    *same_names("vision_model", "tower", "embeddings.patch_embedding.bias"),
    *same_names("vision_model", "tower", "embeddings.position_embedding.weight"),
    *_LAYERS,
    *same_names("vision_model", "tower", weights_and_biases("post_layernorm")),
)
SIGLIP = (Rule(f"vision_model.{_PATCH}", f"tower.{_PATCH}", CONVOLUTION), *_SIGLIP_REST)
NAFLEX = (Rule(f"vision_model.{_PATCH}", f"tower.{_PATCH}", PATCHES), *_SIGLIP_REST)
