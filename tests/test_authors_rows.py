"""Promises about the rows and layers that authors' code reads around a method's choice.

PACT's mean query is of all rows up to the prompt's last visual token with `prompt`, and PruMerge
reads the layer behind the one whose output the features are.

Shapes: L rows, n tokens, H heads, G key/value heads, d head size, S tokens with CLS, D features.
"""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_vlm_prune import load
from mlx_vlm_prune.models.decoder import LayerInput
from mlx_vlm_prune.pruners import plan
from torch_ref.models.decoder import mean_query_attention

from . import host_models, llava
from .author_inputs import wave
from .llava import N
from .pruner_cases import close
from .test_llava import as_mx, pixels

L, H, G, d = 14, 4, 2, 6
IMAGES = [range(3, 7), range(9, 13)]
QUERIES, KEYS = wave(L, H * d, 0.9, 0.4)[0], wave(L, G * d, 1.7, 0.6)[0]
# orailix/PACT@cf9a0c9, modeling_qwen2.py from line 999, with configs/pact.json, run in float64:
# `scores` of both images' tokens ahead of their norm.
PACT_SHARES = [0.078625, 0.0893, 0.076026, 0.068679, 0.08218, 0.07038, 0.069636, 0.078782]


def split(x: mx.array, heads: int, first: int, last: int) -> mx.array:
    """Some features as (B, heads, L, d)."""
    return x[..., first:last].reshape(*x.shape[:2], heads, d).swapaxes(1, 2)


def layer_input(padding: int) -> LayerInput:
    """A prompt behind some padding, in a batch beside one without images; its rows are its
    queries and keys."""
    x_LD = np.concatenate([QUERIES, KEYS], axis=1)
    x_BLD = mx.array(np.stack([np.pad(x_LD, ((padding, 0), (0, 0)), constant_values=9.0)] * 2))
    length, images = L + padding, [range(i.start + padding, i.stop + padding) for i in IMAGES]
    spliced = SimpleNamespace(
        x_BLD=x_BLD, positions_BL=mx.broadcast_to(mx.arange(length), (2, length)), L=length,
        prompt_of=[1, 1], image_columns=images,
        is_real_BL=mx.broadcast_to(mx.arange(length) >= padding, (2, length)), bias_BL=None,
    )  # fmt: skip
    language = SimpleNamespace(
        rotated_queries=lambda layer, x, at: mx.unflatten(split(x, H, 0, H * d), 1, (G, H // G)),
        rotated_keys=lambda layer, x, at: split(x, G, H * d, (H + G) * d),
    )
    decoder = SimpleNamespace(language=language, cuts=None, cache=[None])
    return LayerInput(decoder, 1, spliced, x_BLD, [0, 1], (2, 2))


@pytest.mark.parametrize("padding", [0, 3])
def test_pacts_mean_query_is_of_all_rows_up_to_the_last_visual_token(padding):
    got = layer_input(padding).mean_attention()
    close(np.array(got["prompt_attention_BN"]).ravel(), np.array(PACT_SHARES, "f4"))
    of_image_IN = np.array(got["mean_attention_BN"])
    np.testing.assert_allclose(of_image_IN.sum(axis=1), 1, rtol=1e-5)
    heads = (
        torch.tensor(vectors).unflatten(1, (-1, d)).transpose(0, 1) for vectors in (QUERIES, KEYS)
    )
    ahead_1m = mean_query_attention(*(x[:, : IMAGES[-1].stop] for x in heads))
    theirs = [ahead_1m[0, list(image)].tolist() for image in IMAGES]
    close(np.array(theirs, "f4").ravel(), np.array(PACT_SHARES, "f4"))


def highest(q_D: np.ndarray, k_SD: np.ndarray, K: int) -> list[int]:
    """The K tokens that CLS's query fits best, all heads as one."""
    logits_S = k_SD.astype("f8") @ q_D.astype("f8")
    return sorted(np.argsort(-logits_S[1:])[:K].tolist())


@pytest.mark.parametrize(("spec", "behind"), [("prumerge", 1), ("prumerge:behind=false", 0)])
def test_prumerge_reads_the_layer_that_reads_the_features(spec, behind, tmp_path):
    """42Shawn/LLaVA-PruMerge@097c041: of CLIP's 24 layers number 23, where LLaVA takes the output
    of 22. The oracle is transformers' tower."""
    stock, K, pixels_I3HW = llava.random_model(), 7, pixels()
    tower = stock.model.vision_tower
    with torch.no_grad():
        states = tower(pixels_I3HW, output_hidden_states=True).hidden_states
        layers = next(m for m in tower.modules() if isinstance(m, torch.nn.ModuleList))
        number = len(layers) - 2 + behind
        attention = layers[number].self_attn
        x_SD = layers[number].layer_norm1(states[number])[0]
        expected = highest(attention.q_proj(x_SD[0]).numpy(), attention.k_proj(x_SD).numpy(), K)
    model, _ = load(llava.write(stock, tmp_path / "hf"), dtype="float32")
    read = model([llava.prompt()], as_mx(pixels_I3HW), plan(spec), K)
    assert read.trace.steps[-1].reductions[0].index_BK[0].tolist() == expected


def test_of_a_tower_without_a_layer_behind_the_last_is_read(tmp_path):
    model, _ = load(llava.write(llava.random_model("vicuna, last layer"), tmp_path / "hf"))
    assert model.config.vision.layers_behind == 0
    one, other = (
        model([llava.prompt()], as_mx(pixels()), plan(spec), N // 2).logits_BLV
        for spec in ("prumerge", "prumerge:behind=false")
    )
    assert mx.array_equal(one, other)


@pytest.mark.parametrize(("spec", "behind"), [("prumerge", 1), ("prumerge:behind=false", 0)])
def test_so_does_it_in_mlx_vlms_llava(spec, behind):
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    from .host_reference import indices, reduced

    model = host_models.llava()
    inputs = host_models.KINDS["llava"].inputs(model, 1)
    pixels_IHW3 = inputs.pixels.transpose(0, 2, 3, 1)
    *_, states = model.vision_tower(pixels_IHW3, output_hidden_states=True)
    layers = model.vision_tower.vision_model.encoder.layers
    number = range(len(layers) + 1)[model.vision_feature_layer] - 1 + behind
    assert number < len(layers)
    attention = layers[number].self_attn
    x_SD = layers[number].layer_norm1(states[number])[0]
    (index,) = indices(reduced(model, inputs, spec, 0.4))
    q_D, k_SD = np.array(attention.q_proj(x_SD[0])), np.array(attention.k_proj(x_SD))
    assert index == highest(q_D, k_SD, len(index))
