"""The towers of mlx-vlm's models once more, token by token and head by head, in NumPy.

Linear layers, norms and MLPs are the model's own, row by row; attention, windows, groups, what
leaves and what merges are loops here. Nothing of the product is used.

Shapes: N visual tokens of a picture of g patches each, S rows, D features, H heads, d head size,
a angles.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_prune.hosts.prepared_inputs import PreparedInputs

from .tower_tokens import (
    Read,
    Token,
    flowing,
    highest,
    in_raster_order,
    merged,
    merged_in_windows,
    recycled,
)  # fmt: skip

ILLAVA = {3: {1: 3}, 4: {1: 2, 2: 3}}  # thirds of what leaves, by depth and layer


@dataclass
class Picture:
    """A picture as the first layer reads it; `finish` makes a visual token of g rows."""

    tokens: list[Token]
    layers: list[Any]
    heads: Callable[[Any, mx.array], list[mx.array]]
    out: Callable[[Any, mx.array], mx.array]
    mlp: Callable[[Any, mx.array], mx.array]
    finish: Callable[[mx.array], mx.array]
    grid: tuple[int, int]  # rows and columns of visual tokens
    windowed: Callable[[int], bool] = lambda layer: False
    deepstack: dict[int, Any] = field(default_factory=dict)


def by_rows(function: Callable, *arguments: Any) -> np.ndarray:
    *rest, x = arguments
    return np.array(function(*rest, mx.array(x.astype(np.float32))), np.float64)


def encode(picture: Picture, spec: str, K: int) -> tuple[list[int], np.ndarray, list[np.ndarray]]:
    """The places, visual tokens and what DeepStack adds of K tokens that a method leaves, or of
    all where those that left come back."""
    depth, absent = len(picture.layers), None
    order = [token for token in picture.tokens if token.place >= 0]
    cls, N = [token for token in picture.tokens if token.place < 0], len(order)
    entered = {token.place: token.rows for token in order}
    if spec == "patch_norm":
        order = highest([np.linalg.norm(token.patches) for token in order], order, K)
    for i, layer in enumerate(picture.layers):
        if spec.startswith("ipcv") and i == 1:
            absent = Absent(order, K)
            order = highest([np.linalg.norm(t.rows - entered[t.place]) for t in order], order, K)
        if spec == "window_merge" and i == 1:
            order = merged_in_windows(order, picture.grid, K)
        tokens = [*cls, *in_raster_order(order)]
        read = attend(picture, i, tokens, absent.left(order) if i == 1 and absent else [])
        for token in tokens:
            token.rows = token.rows + read.y[id(token)]
        order = leave(spec, (i, depth), (N, K), order, read, bool(cls))
        for token in [*cls, *order]:
            token.rows = token.rows + by_rows(picture.mlp, layer, token.rows)
        if i in picture.deepstack:
            returning = absent.left(order) if absent and "+" in spec else []
            for token in [*order, *returning]:
                token.deep.append(by_rows(picture.deepstack[i], token.rows)[0])
    order += absent.left(order) if absent and "+" in spec else []
    order = in_raster_order(order)
    x_KD = np.stack([by_rows(picture.finish, token.rows) for token in order])
    deep = [np.stack(list(each)) for each in zip(*(token.deep for token in order), strict=True)]
    return [token.place for token in order], x_KD, deep


def leave(
    spec: str, layer: tuple[int, int], budget: tuple[int, int], order: list[Token], read: Read,
    has_cls: bool,
) -> list[Token]:  # fmt: skip
    """What a method leaves between attention and MLP of a layer (its number, of so many)."""
    (i, depth), (N, K) = layer, budget
    if spec == "kq_norm" and i == max(1, int(depth / 2 + 0.5)):
        return highest([read.norms[id(token)] for token in order], order, K)
    if spec == "illava_tower" and (thirds := ILLAVA[depth].get(i)):
        scores = [read.received[id(token)] for token in order]
        return recycled(scores, order, N - (N - K) * thirds // 3)
    if spec == "flowcut" and i <= depth - 2:
        return flowing(order, read, K, depth - 2 - i)
    left = K if i == depth - 1 else N - int((N - K) * (i + 1) / depth + 1e-9)
    if spec == "tome" and len(order) > left:
        return merged(order, read.keys, len(order) - left, has_cls)
    return order


class Absent:
    """IPCV's tokens that left, as the change of their nearest kept ones makes them."""

    def __init__(self, tokens: list[Token], K: int):
        self.tokens = in_raster_order(tokens)
        self.then = {token.place: token.rows for token in tokens}

    def left(self, kept: list[Token]) -> list[Token]:
        places, now = {token.place for token in kept}, {token.place: token.rows for token in kept}
        gone = [token for token in self.tokens if token.place not in places]
        for token in gone:
            then = self.then[token.place]
            near = sorted(places, key=lambda p: (np.linalg.norm(then - self.then[p]), p))[:10]
            token.rows = then + np.mean([now[p] - self.then[p] for p in near], axis=0)
        return gone


def attend(picture: Picture, number: int, tokens: list[Token], others: list[Token]) -> Read:
    """In a layer; `others` are attended to and ask nothing."""
    layer, parts, every = picture.layers[number], [], [*tokens, *others]
    for token in every:
        q, k, v = (np.array(x, np.float64) for x in picture.heads(
            layer, mx.array(token.rows.astype(np.float32))))  # fmt: skip
        if token.angles is not None:
            q, k = rotated(q, token.angles), rotated(k, token.angles)
        parts.append((q, k, v))
    read = Read(received=dict.fromkeys(map(id, every), 0.0))
    has_cls = tokens[0].place < 0
    v_SHd = np.concatenate([v for _, _, v in parts[: 1 if has_cls else None]])
    read.cls_value = v_SHd.mean(axis=0)
    for token, (q, own_k, own_v) in zip(tokens, parts, strict=False):
        read.norms[id(token)] = float(np.linalg.norm(q) + np.linalg.norm(own_k))
        read.keys[id(token)] = own_k.mean(axis=1).reshape(-1)
        read.values[id(token)] = own_v.mean(axis=0)
        is_seen = [not picture.windowed(number) or other.window == token.window for other in every]
        seen = [(other, *parts[j][1:]) for j, other in enumerate(every) if is_seen[j]]
        k_SHd, v_SHd = (np.concatenate([each[j] for each in seen]) for j in (1, 2))
        size_S = np.concatenate([[other.size] * len(k) for other, k, _ in seen])
        y_gHd = np.empty_like(q)
        for patch in range(len(q)):
            for head in range(q.shape[1]):
                logits = k_SHd[:, head] @ q[patch, head] / np.sqrt(q.shape[2]) + np.log(size_S)
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                y_gHd[patch, head] = weights @ v_SHd[:, head]
                begin = 0
                for other, k, _ in seen:
                    read.received[id(other)] += weights[begin : begin + len(k)].sum()
                    begin += len(k)
        if token.place < 0:
            read.from_cls = dict(read.received)  # CLS asks first
        read.y[id(token)] = by_rows(picture.out, layer, y_gHd.reshape(len(q), -1))
    return read


def rotated(x_gHd: np.ndarray, angles_ga: np.ndarray) -> np.ndarray:
    first, second = np.split(x_gHd, 2, axis=-1)
    cos, sin = np.cos(angles_ga)[:, None], np.sin(angles_ga)[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def pictures(name: str, model: Any, inputs: PreparedInputs) -> list[Picture]:
    """Every picture of a prompt, in order."""
    if "image_grid_thw" in inputs.extra:
        return qwen_pictures(name, model, inputs)
    pixels = inputs.pixels[0] if inputs.pixels.ndim == 5 else inputs.pixels
    return [patch_picture(name, model, each_3HW) for each_3HW in pixels]


def patch_picture(name: str, model: Any, pixels_3HW: mx.array) -> Picture:
    """Of a tower like CLIP's or SigLIP's."""
    tower = getattr(model, "vision_model", None) or model.vision_tower.vision_model
    pixels_1HW3 = pixels_3HW[None].transpose(0, 2, 3, 1)
    mask = [mx.ones((1, 4, 4), mx.bool_)] if name in ("idefics3", "smolvlm") else []
    x_SD = tower.embeddings(pixels_1HW3, *mask)[0]
    if hasattr(tower, "pre_layrnorm"):
        x_SD = tower.pre_layrnorm(x_SD)
    patches_HWD = np.array(tower.embeddings.patch_embedding(pixels_1HW3)[0], np.float64)
    m = {"gemma3": 2, "idefics3": 2, "smolvlm": 2, "internvl_chat": 2}.get(name, 1)
    has_cls = name in ("llava", "llava_next", "internvl_chat")
    rows_SD = np.array(x_SD, np.float64)
    tokens = [Token(-1, rows_SD[:1])] if has_cls else []
    grid_HWD = rows_SD[int(has_cls) :].reshape(patches_HWD.shape)
    height, width = (n // m for n in patches_HWD.shape[:2])
    for place in range(height * width):
        row, column = divmod(place, width)
        block = slice(row * m, row * m + m), slice(column * m, column * m + m)
        flat = (grid[block].reshape(m * m, -1) for grid in (grid_HWD, patches_HWD))
        tokens.append(Token(place, *flat))
    layers = tower.encoder.layers
    if name in ("llava", "llava_next"):
        layers = layers[: model.vision_feature_layer + 1 or None]
    if name == "internvl_chat":
        return Picture(
            tokens, layers, intern_heads, lambda layer, y: layer.attn.proj(y) * layer.ls1,
            lambda layer, x: layer.mlp(layer.norm2(x)) * layer.ls2, finisher(name, model, tower),
            (height, width),
        )  # fmt: skip
    return Picture(
        tokens, layers, siglip_heads, lambda layer, y: layer.self_attn.out_proj(y),
        lambda layer, x: layer.mlp(layer.layer_norm2(x)), finisher(name, model, tower),
        (height, width),
    )  # fmt: skip


def siglip_heads(layer: Any, x_SD: mx.array) -> list[mx.array]:
    attention, x_SD = layer.self_attn, layer.layer_norm1(x_SD)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return [project(x_SD).reshape(len(x_SD), attention.num_heads, -1) for project in projections]


def intern_heads(layer: Any, x_SD: mx.array) -> list[mx.array]:
    attention = layer.attn
    q, k, v = mx.split(attention.qkv(layer.norm1(x_SD)), 3, axis=-1)
    if attention.qk_normalization:
        q, k = attention.q_norm(q), attention.k_norm(k)
    return [x.reshape(len(x_SD), attention.num_heads, -1) for x in (q, k, v)]


def finisher(name: str, model: Any, tower: Any) -> Callable[[mx.array], mx.array]:
    from mlx_vlm.models.base import pixel_shuffle

    return {
        "gemma3": lambda x_gD: tower.post_layernorm(x_gD).mean(axis=0),
        "paligemma": lambda x_gD: tower.post_layernorm(x_gD)[0],
        "internvl_chat": lambda x_gD: pixel_shuffle(x_gD[None], 0.5)[0, 0],
        "idefics3": lambda x_gD: model.connector.pixel_shuffle(tower.post_layernorm(x_gD)[None], 2)[
            0, 0
        ],
    }.get("idefics3" if name == "smolvlm" else name, lambda x_gD: x_gD[0])


def qwen_pictures(name: str, model: Any, inputs: PreparedInputs) -> list[Picture]:
    """Image by image, tokens in the tower's own order; a window is the stock tower's."""
    tower, read_pictures, begin = model.vision_tower, [], 0
    for grid in inputs.extra["image_grid_thw"].tolist():
        n = grid[1] * grid[2]
        grid_13 = mx.array([grid])
        patches_SD = tower.patch_embed(inputs.pixels[begin : begin + n])
        x_SD = patches_SD
        if hasattr(tower, "fast_pos_embed_interpolate"):
            x_SD = x_SD + tower.fast_pos_embed_interpolate(grid_13)
        angles_Sa = tower.rot_pos_emb(grid_13).reshape(n, -1)
        arrays = [np.array(x, np.float64).reshape(n // 4, 4, -1)
                  for x in (x_SD, patches_SD, angles_Sa)]  # fmt: skip
        order, ends = list(range(n // 4)), [0, n]
        if hasattr(tower, "get_window_index"):
            windows, bounds = tower.get_window_index(grid_13)
            order, ends = windows.tolist(), bounds.tolist()
        tokens = [
            Token(place, *(x[place] for x in arrays), int(np.searchsorted(ends, 4 * i, "right")))
            for i, place in enumerate(order)
        ]
        full = getattr(tower, "fullatt_block_indexes", range(len(tower.blocks)))
        deep = zip(getattr(tower, "deepstack_visual_indexes", []),
                   getattr(tower, "deepstack_merger_list", []), strict=True)  # fmt: skip
        read_pictures.append(Picture(
            sorted(tokens, key=lambda token: token.place), list(tower.blocks), qwen_heads,
            lambda block, y: block.attn.proj(y), lambda block, x: block.mlp(block.norm2(x)),
            lambda x_gD: tower.merger(x_gD)[0], (grid[1] // 2, grid[2] // 2),
            lambda layer, full=full: layer not in full, dict(deep),
        ))  # fmt: skip
        begin += n
    return read_pictures


def qwen_heads(block: Any, x_SD: mx.array) -> list[mx.array]:
    qkv = block.attn.qkv(block.norm1(x_SD)).reshape(len(x_SD), 3, block.attn.num_heads, -1)
    return [qkv[:, i] for i in range(3)]
