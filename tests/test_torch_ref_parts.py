"""Promises of the reference's parts: language model and tower, against transformers.

Shapes: B prompts, I images, N visual tokens, L tokens, S = N + 1 with CLS, D features.
"""

import copy
from dataclasses import asdict

import pytest
import torch

from mlx_vlm_prune.checkpoints.errors import UserError
from torch_ref.models.vlm import VLM

from . import tiny


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return tiny.reference()


@pytest.fixture(scope="module")
def pixels_I3HW() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """float32 parity: rtol 1e-4, atol 1e-5 of the largest value."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


# --- the language model ---------------------------------------------------------------


def llama(vlm: VLM):
    """transformers' model with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = tiny.TEXT
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=True,
    )
    theirs = LlamaForCausalLM(config).eval()
    named = {f"model.{name}": tensor for name, tensor in vlm.model.state_dict().items()}
    missing, extra = theirs.load_state_dict(named, strict=False)
    assert missing == ["lm_head.weight"] and not extra
    theirs.tie_weights()
    return theirs


def test_the_language_model_equals_llama(vlm):
    ids_BL = torch.randint(tiny.TEXT.vocab_size, (2, 23))
    position_BL = torch.arange(23).expand(2, -1)
    ours = vlm.language.logits(vlm.language(vlm.language.embed_tokens(ids_BL), position_BL))
    close(ours, llama(vlm)(ids_BL).logits)


def test_the_language_model_equals_llama_where_positions_have_gaps(vlm):
    ids_1L, position_1L = torch.tensor([[9, 4, 30, 7, 7, 12]]), torch.tensor([[0, 1, 5, 6, 40, 41]])
    ours = vlm.language.logits(vlm.language(vlm.language.embed_tokens(ids_1L), position_1L))
    close(ours, llama(vlm)(ids_1L, position_ids=position_1L).logits)
    with pytest.raises(AssertionError):  # positions matter to this model
        close(ours, llama(vlm)(ids_1L).logits)


def test_the_check_against_llama_can_fail(vlm):
    """Interleaved rotation, which the releases before April 2025 had, must not pass."""
    ids_1L, position_1L = torch.tensor([[9, 4, 30, 7, 7, 12]]), torch.arange(6)[None]
    d = tiny.TEXT.head_dim
    halves_to_pairs = torch.arange(d).reshape(2, d // 2).mT.flatten()
    broken = tiny.reference()
    for layer in broken.language.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            weight_HdD = projection.weight.data.unflatten(0, (-1, d))
            projection.weight.data = weight_HdD[:, halves_to_pairs].flatten(0, 1)
    ours = broken.language.logits(
        broken.language(broken.language.embed_tokens(ids_1L), position_1L)
    )
    with pytest.raises(AssertionError):
        close(ours, llama(vlm)(ids_1L).logits)


# --- the tower ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(vlm, pixels_I3HW):
    """What transformers' tower says with the same weights, and the keys of every layer."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    theirs = CLIPVisionModel(
        CLIPVisionConfig(**asdict(tiny.VISION), attn_implementation="eager")
    ).eval()
    theirs.load_state_dict(vlm.tower.state_dict())
    keys = []
    for layer in theirs.encoder.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda *call: keys.append(call[-1]))
    with torch.no_grad():
        output = theirs(pixels_I3HW, output_hidden_states=True, output_attentions=True)
    return output, keys


def test_the_tower_equals_clip_after_every_layer(vlm, clip, pixels_I3HW):
    output, _ = clip
    for n in range(1, tiny.VISION.num_hidden_layers + 1):
        shorter = copy.deepcopy(vlm.tower)
        shorter.encoder.layers = shorter.encoder.layers[:n]
        close(shorter(pixels_I3HW).signals.x_BND, output.hidden_states[n][:, 1:])


def test_the_features_are_the_last_layers_without_cls_and_without_a_norm(vlm, clip, pixels_I3HW):
    seen = vlm.tower(pixels_I3HW).signals
    close(seen.x_BND, clip[0].hidden_states[-1][:, 1:])
    assert seen.grid == tiny.GRID
    assert seen.get("cls_attention_BN") is None and seen.get("keys_BNHd") is None  # nobody asked


@pytest.mark.parametrize("layer", range(-3, 3))
def test_the_cls_row_is_that_of_eager_attention_at_every_layer(vlm, clip, pixels_I3HW, layer):
    row_IN = vlm.tower(pixels_I3HW, {"cls_attention": layer}).signals.cls_attention_BN
    close(row_IN, clip[0].attentions[layer].mean(1)[:, 0, 1:])


@pytest.mark.parametrize("layer", range(-3, 3))
def test_the_keys_are_those_of_clip_at_every_layer(vlm, clip, pixels_I3HW, layer):
    keys_INHd = vlm.tower(pixels_I3HW, {"keys": layer}).signals.keys_BNHd
    close(keys_INHd.flatten(2), clip[1][layer][:, 1:])


@pytest.mark.parametrize("layer", range(-3, 3))
def test_received_attention_is_the_column_mean_of_eager_attention(vlm, clip, pixels_I3HW, layer):
    column_IN = vlm.tower(pixels_I3HW, {"received_attention": layer}).signals.received_attention_BN
    close(column_IN, clip[0].attentions[layer].mean(dim=(1, 2))[:, 1:])


@pytest.mark.parametrize("layer", [-4, 3])
def test_a_layer_that_the_tower_lacks_is_refused(vlm, pixels_I3HW, layer):
    with pytest.raises(UserError, match=f"no layer {layer}; give -3 to 2"):
        vlm.tower(pixels_I3HW, want={"cls_attention": layer})
