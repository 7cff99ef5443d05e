"""Promises about what towers of mlx-vlm's hand to methods: attention, and the prompt's words."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.prepared_inputs import PreparedInputs

from .host_models import IMAGE, KINDS, cached_models
from .host_reference import MROPE, encoded, indices, prompt, reduced, table


@pytest.fixture(scope="module")
def models():
    return cached_models()


JOINED = "llava_onevision"  # tiles become one picture there, which has a test of its own


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("name", [name for name in KINDS if name not in (*MROPE, JOINED)])
def test_attention_is_what_the_towers_own_layer_computes(models, name, layer, monkeypatch):
    """The stock tower is overheard where it attends; CLS's row, or the mean of all rows."""
    model, inputs, calls, real = models(name), prompt(models, name), [], None

    def overheard(q, k, v, *, scale, mask=None):
        calls.append((np.array(q, np.float64), np.array(k, np.float64), scale, mask))
        return real(q, k, v, scale=scale, mask=mask)

    views = encoded(model, inputs, f"cls_attention:layer={layer}")
    real = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", overheard)
    if name == "gemma4":  # mlx-vlm compiles what calls it
        monkeypatch.setattr("mlx_vlm.models.base.ensure_fused_sdpa", overheard)
    encoded(model, inputs, "none")
    depth = host_of(model).depth
    first = 1 if name == "fastvlm" else 0  # an earlier stage attends, too
    q, k, scale, mask = calls[first + layer % depth]
    logits = q @ k.swapaxes(2, 3) * scale + (0 if mask is None else np.array(mask))
    attention_TSS = softmax(logits).mean(axis=1)
    begin = 0
    for t, view in enumerate(views):
        if name == "pixtral":  # all pictures are one row
            end = begin + view.signals.x_BND.shape[1]
            own_P = attention_TSS[0, begin:end, begin:end].mean(axis=0)
            begin = end
        elif name in ("llava", "llava_next", "internvl_chat"):
            own_P = attention_TSS[t, 0, 1:]
        elif name == "lfm2_vl":  # the last view's rows end in padding
            s = 4 * view.signals.x_BND.shape[1]
            own_P = attention_TSS[t, :s, :s].mean(axis=0)
        else:
            own_P = attention_TSS[t].mean(axis=0)
        rows, columns = view.signals.grid
        m = int((len(own_P) / (rows * columns)) ** 0.5)
        own_N = own_P.reshape(rows, m, columns, m).mean(axis=(1, 3)).ravel()
        np.testing.assert_allclose(
            np.array(view.signals.cls_attention_BN[0]), own_N, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("layer", [0, -1], ids=["in windows", "over the image"])
@pytest.mark.parametrize("name", MROPE)
def test_received_attention_is_put_back_in_rows_and_pooled_by_the_merger(models, name, layer):
    """The whole attention matrix in the tower's order; its columns then go home one by one."""
    model, inputs = models(name), prompt(models, name)
    views = encoded(model, inputs, f"received_attention:layer={layer}")
    received_S = np.zeros(sum(4 * v.signals.x_BND.shape[1] for v in views))
    logits_HSS, same_SS, home_S = whole_attention(model, name, inputs, layer)
    attention_HSS = softmax(np.where(same_SS, logits_HSS, -np.inf))
    begin = 0
    for view in views:
        h, w = (2 * n for n in view.signals.grid)
        image = slice(begin, begin + h * w)
        column_S = attention_HSS[:, image].mean(axis=(0, 1))
        received_S[begin + np.array(home_S[image])] = column_S[image]
        patches = received_S[image].reshape(h // 2, 2, w // 2, 2)
        np.testing.assert_allclose(
            np.array(view.signals.received_attention_BN[0]), patches.mean((1, 3)).ravel(), atol=1e-6
        )
        begin += h * w


def whole_attention(model, name: str, inputs: PreparedInputs, layer: int):
    """Logits (H, S, S) of a layer, which patches attend to one another, and each patch's place in
    its image's rows, in the tower's order. A block is caught at work, on the instance."""
    tower, caught = model.vision_tower, {}
    block = tower.blocks[layer]

    class Ear:
        def __call__(self, x, cu_seqlens, rotary_pos_emb):
            caught.update(x=x, ends=cu_seqlens.tolist(), angles=rotary_pos_emb)
            return block(x, cu_seqlens=cu_seqlens, rotary_pos_emb=rotary_pos_emb)

    tower.blocks[layer] = Ear()
    try:
        mx.eval(tower(inputs.pixels, inputs.extra["image_grid_thw"]))
    finally:
        tower.blocks[layer] = block
    S = len(caught["x"])
    qkv = np.array(block.attn.qkv(block.norm1(caught["x"])), np.float64).reshape(S, 3, 2, 16)
    angle_Sd = np.tile(np.array(caught["angles"], np.float64), 2)[:, None]
    turn = [z * np.cos(angle_Sd) + np.concatenate([-z[..., 8:], z[..., :8]], -1) * np.sin(angle_Sd)
            for z in (qkv[:, 0], qkv[:, 1])]  # fmt: skip
    logits_HSS = np.einsum("qhd,khd->hqk", *turn) / 4
    stretch_S = np.searchsorted(caught["ends"], np.arange(S), side="right")
    tokens = range(S // 4)
    if name == "qwen2_5_vl":
        tokens = tower.get_window_index(inputs.extra["image_grid_thw"])[0].tolist()
    home, begin = {}, 0
    for _, h, w in inputs.extra["image_grid_thw"].tolist():
        for n in range(h * w // 4):
            row, column = divmod(n, w // 2)
            home[begin + n] = [(2 * row + a) * w + 2 * column + b for a in (0, 1) for b in (0, 1)]
        begin += h * w // 4
    home_S = [place for token in tokens for place in home[token]]
    return logits_HSS, stretch_S[:, None] == stretch_S, home_S


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("name", KINDS)
def test_the_words_are_the_prompts_without_its_placeholders(models, name):
    model, inputs = models(name), prompt(models, name, 1)
    view, *_ = encoded(model, inputs, "mmtok")
    words = [token for token in inputs.ids if token not in (IMAGE, -200)]
    np.testing.assert_array_equal(
        np.array(view.signals.text_BTD[0]), np.array(table(model)(mx.array(words)))
    )


@pytest.mark.parametrize("name", ["llava", *MROPE])
def test_images_do_not_change_one_anothers_choice(models, name):
    model, both = models(name), prompt(models, name)
    one = prompt(models, name, 1)
    together = indices(reduced(model, both, "vispruner", 0.25))
    pixels = both.pixels[:1] if name == "llava" else both.pixels[: 4 * 24]
    assert indices(reduced(model, replace(one, pixels=pixels), "vispruner", 0.25)) == together[:1]
