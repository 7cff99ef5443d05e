"""Tensor names of towers in Hugging Face's layout (left) and ours."""

from .rules import Rule, same_names, weights_and_biases
from .value_order import CONVOLUTION, PATCHES

_PATCH = "embeddings.patch_embedding.weight"
_LAYER = weights_and_biases(
    "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj "
    "layer_norm1 mlp.fc1 mlp.fc2 layer_norm2"
)
_LAYERS = same_names("vision_model.encoder.layers.*", "tower.encoder.layers.*", _LAYER)
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

# What a whole CLIP or SigLIP has beside the vision tower.
_TEXT = (
    *same_names("text_model.embeddings", "text.embeddings", "token_embedding.weight"),
    *same_names("text_model.embeddings", "text.embeddings", "position_embedding.weight"),
    *same_names("text_model.encoder.layers.*", "text.encoder.layers.*", _LAYER),
    *same_names("text_model", "text", weights_and_biases("final_layer_norm")),
)
_HEAD = "attention.in_proj_weight attention.in_proj_bias probe " + weights_and_biases(
    "attention.out_proj layernorm mlp.fc1 mlp.fc2"
)
WHOLE_CLIP = (
    Rule("logit_scale", "logit_scale"),
    *CLIP,
    *_TEXT,
    *(Rule(f"{x}_projection.weight", f"{x}_projection.weight") for x in ("visual", "text")),
)
WHOLE_SIGLIP = (
    Rule("logit_scale", "logit_scale"),
    Rule("logit_bias", "logit_bias"),
    *SIGLIP,
    *same_names("vision_model.head", "head", _HEAD),
    *_TEXT,
    *same_names("text_model", "text", weights_and_biases("head")),
)
