"""What an answer of a pruned host must be, without the product.

The stock tower's embeddings, the rows that stay and their positions by counting, and the language
model without a cache over the whole sequence.

Shapes: N visual tokens of an image, L rows, D features, V words.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_vlm_prune.hosts.compatibility import check_pipeline
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.prepared_inputs import PreparedInputs
from mlx_vlm_prune.hosts.prompt import PrunedPrompt, encode_images_and_text, prune_prompt
from mlx_vlm_prune.hosts.views import View
from mlx_vlm_prune.pruners import METHODS, plan

from . import host_models
from .host_models import IMAGE, KINDS

TOKENS = 5
QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
HYBRID = ["qwen3_5", "qwen3_5_moe"]  # some layers are recurrent
MROPE = [*QWEN, *HYBRID]


def prompt(models, name: str, images: int | None = None) -> PreparedInputs:
    return KINDS[name].inputs(models(name), images)


def reduced(model, inputs: PreparedInputs, spec: str, ratio: float, positions=None) -> PrunedPrompt:
    host, pipeline = host_of(model), plan(spec)
    policy = check_pipeline(host, pipeline, positions)

    def budgets(views: Sequence[View]) -> list[int]:
        return [max(1, int(view.N * ratio)) for view in views]

    views = encode_images_and_text(host, inputs, pipeline, budgets)
    return prune_prompt(host, inputs, views, pipeline, budgets(views), policy)


def encoded(model, inputs: PreparedInputs, spec: str):
    return encode_images_and_text(host_of(model), inputs, plan(spec))


def decoded(model, arguments: dict, **options) -> tuple[list[int], np.ndarray]:
    """Tokens and their log probabilities (T, V), by mlx-vlm's own loop."""
    from mlx_vlm.generate.ar import generate_step

    rest = {**arguments, **options}
    ids, pixels, mask = (rest.pop(x) for x in ("input_ids", "pixel_values", "mask"))
    steps = list(generate_step(ids, model, pixels, mask, max_tokens=TOKENS, temperature=0, **rest))
    return [token for token, _ in steps], np.stack([np.array(odds) for _, odds in steps])


def stock(model, inputs: PreparedInputs, **options) -> tuple[list[int], np.ndarray]:
    """The unpruned model, left to itself."""
    arguments = {"input_ids": mx.array(inputs.ids)[None], "pixel_values": inputs.pixels}
    return decoded(model, {**arguments, "mask": inputs.mask_1L, **inputs.extra}, **options)


def indices(prompt: PrunedPrompt) -> list[list[int]]:
    return [one.index_BK[0].tolist() for one in prompt.trace.steps[-1].reductions]


def reference(
    models, name: str, inputs: PreparedInputs, kept: list[list[int]], policy: str = "keep",
    biases: list[list[float]] | None = None,
):  # fmt: skip
    """The same without a cache, each step over all rows, at positions counted here; `biases` are
    added to the attention that each picture's tokens get."""
    model, kind = models(name), KINDS[name]
    embeds, deep = kind.full(model, inputs) if inputs.pixels is not None else ([], [])
    x_LD, places, visual = rows(model, name, inputs, kept, embeds)
    words = [token for token in inputs.ids if token not in (IMAGE, -200)]
    ids = [0 if is_visual else words.pop(0) for is_visual in visual]
    if policy == "renumber":
        places = [(i, i, i) for i in range(len(places))]
    added = [
        mx.concatenate([y[layer][mx.array(k)] for y, k in zip(deep, kept, strict=True)])
        for layer in range(len(deep[0]) if deep else 0)
    ]
    tokens, odds = [], []
    for _ in range(TOKENS):
        logits_V = forward(model, name, x_LD, places, visual, added, biases, ids)
        odds.append(np.array(logits_V - mx.logsumexp(logits_V)))
        tokens.append(int(odds[-1].argmax()))
        x_LD = mx.concatenate([x_LD, embed(model, name, tokens[-1])])
        places, visual = [*places, (max(places[-1]) + 1,) * 3], [*visual, False]
        ids = [*ids, tokens[-1]]
    return tokens, np.stack(odds)


def table(model):
    return getattr(model.language_model, "model", model.language_model).embed_tokens


def embed(model, name: str, token: int):
    """A word's row (1, D) as the layers take it in."""
    x_1D = table(model)(mx.array([token]))
    return x_1D * 8 if name == "gemma4" else x_1D


def rows(model, name: str, inputs: PreparedInputs, kept, embeds):
    """Embeddings, positions and what is visual of the rows left, picture after picture by hand."""
    x, places, visual, at, kind = [], [], [], 0, KINDS[name]
    coming = [(v, i) for v, picture in enumerate(embeds) for i in range(len(picture))]
    mark = -200 if name == "fastvlm" else IMAGE
    lines = iter(new_lines(kind))
    for token in inputs.ids:
        if token != mark:
            x.append(embed(model, name, token)[0])
            places.append((at, at, at))
            visual.append(False)
            at += 1
            continue
        if next(lines, False):
            continue
        taken = coming[:1] if kind.marks == "token" else coming
        coming = coming[len(taken) :]
        for v, i in taken:
            height, width = kind.grids[v]
            if i in kept[v]:
                x.append(embeds[v][i])
                places.append((at, at + i // width, at + i % width))
                visual.append(True)
            if i == height * width - 1:
                at += max(height, width)
    return mx.stack(x), places, visual


def new_lines(kind) -> list[bool]:
    """Which placeholders, picture after picture, are new lines and no visual token."""
    flags = []
    for (height, width), n in zip(kind.grids, kind.breaks, strict=False):
        flags += ([False] * width + [True]) * height if n else [False] * height * width
    return flags


class MaskOnly:
    """In place of a cache: nothing is held, and every layer gets this mask."""

    offset = 0

    def __init__(self, mask: mx.array):
        self.mask = mask

    def make_mask(self, *sizes, **options) -> mx.array:
        return self.mask

    def update_and_fetch(self, keys, values):
        return keys, values


def biased_mask(visual, biases: list[list[float]]) -> mx.array:
    """A causal mask with what is added to the attention that visual rows get, (1, 1, L, L)."""
    mask_LL = np.triu(np.full((len(visual),) * 2, -np.inf, np.float32), 1)
    mask_LL[:, np.flatnonzero(visual)] += np.concatenate(biases).astype(np.float32)
    return mx.array(mask_LL)[None, None]


def masks(language, mask: mx.array) -> list:
    """In place of caches, for the layers that attend."""
    attends = [getattr(layer, "is_attention_layer", True) for layer in language.layers]
    return [MaskOnly(mask) if each else None for each in attends]


def forward(model, name: str, x_LD, places, visual, added, biases=None, ids=()):
    """Logits (V,) of the last row. `ids` are 0 of visual rows; some models take them in, too."""
    language, x_1LD, L = model.language_model, x_LD[None], len(x_LD)
    ids, more = mx.array([ids]) if len(ids) == L else mx.zeros((1, L), mx.int32), {}
    if name == "paligemma":  # the prompt sees all of itself; what is generated is causal
        prompt = 1 + max(i for i, is_image in enumerate(visual) if is_image)
        prompt += len(host_models.WORDS[2])
        at = mx.arange(L)
        more["mask"] = ((at < prompt) | (at <= at[:, None]))[None, None]
    cache = None
    if biases is not None:
        cache = masks(language, biased_mask(visual, biases))
    if name not in MROPE:  # positions are counted by the model itself
        return language(ids, inputs_embeds=x_1LD, cache=cache, **more).logits[0, -1]
    more["position_ids"] = mx.array(places).T[:, None]
    if added:
        more |= {"visual_pos_masks": mx.array([visual]), "deepstack_visual_embeds": added}
    h_1LD = language.model(ids, inputs_embeds=x_1LD, cache=cache, **more)
    head = language.lm_head if hasattr(language, "lm_head") else table(model).as_linear
    return head(h_1LD)[0, -1]


def let_norm_choose(monkeypatch, prune) -> None:
    """Let `norm` choose like this."""
    monkeypatch.setitem(METHODS, "norm", replace(METHODS["norm"], prune=prune))


def kept(index: list[int]):
    from mlx_vlm_prune.pruners import Reduction

    return Reduction(mx.array([index]))


def rotary_means(name: str, layer, place_N3: np.ndarray) -> dict[str, mx.array]:
    """Of each place the means of RoPE's cosines and sines, over the axes that a family has."""
    base = getattr(getattr(layer.self_attn, "rope", None), "base", 1e4)
    place_NA = place_N3 if name in QWEN else place_N3[:, :1]
    angle_NAh = place_NA[..., None] * base ** (-np.arange(8) / 8)
    return {
        f"rotary_{turn}_BN": mx.array(of(angle_NAh).mean(axis=(1, 2)), mx.float32)[None]
        for turn, of in (("cosine", np.cos), ("sine", np.sin))
    }
