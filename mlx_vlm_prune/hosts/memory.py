"""Whether a model of mlx-vlm's fits into memory, and a picture with its prompt beside it.

This is said before the weights are read.

The weights are counted exactly. What reading takes is an estimate, from the sizes in config.json: a
layer's activations, the scores of attention where a CPU holds them, the cache, and the logits of a
row: mlx-vlm reads a prompt in pieces and computes no others.

Shapes: S patches of a picture, N visual tokens, L rows of a prompt, D features, I of a layer's
network, H heads, V words.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints.errors import UserError
from ..checkpoints.processor import PREPROCESSOR_CONFIG
from ..checkpoints.reading.files import read_json
from ..checkpoints.reading.tensors import RawTensor
from ..machine.hardware import on_cpu
from ..models import memory
from ..models.arrays import FLOATS
from ..models.layers import PREFILL_STEP_SIZE

logger = logging.getLogger("mlx_vlm_prune")
SIDE, PATCH = 1024, 14  # of a picture and its patches, in pixels, where the config has no size
TEXT = 128  # rows of words
FEWER_BITS = "convert it in 4 bits (python -m mlx_vlm.convert -q)"
HALF = "load it in float16 or "
RESIZE = "make pictures smaller (resize_shape) or "
# Fields of what one picture becomes, whatever its size.
SOFT_TOKENS = ("mm_tokens_per_image", "vision_soft_tokens_per_image")


@dataclass(frozen=True)
class Reading:
    """What reading a prompt with one picture takes beside the weights; whether a smaller picture
    takes less."""

    visual_tokens: int
    nbytes: int
    is_resizable: bool


def check_memory(
    folder: Path,
    tensors: Mapping[str, RawTensor],
    config: Mapping[str, Any],
    dtype: mx.Dtype | None,
) -> None:
    """UserError where the weights in `dtype` (None: as they are) do not fit into memory; a warning
    where no picture fits beside them."""
    weights, reading = weights_bytes(tensors, dtype), estimate(config, dtype, preprocessor(folder))
    half = HALF if weights > weights_bytes(tensors, mx.float16) else ""
    memory.check_fits(weights, str(folder), f"{half}{FEWER_BITS}")
    available = memory.available_bytes()
    if available is not None and weights + reading.nbytes > available:
        logger.warning(
            "%s needs %.1f GB for its weights and about %.1f GB to read a picture of %d visual"
            " tokens, and %.1f GB are available: it may run out of memory; %s%s%s",
            folder, weights / 1e9, reading.nbytes / 1e9, reading.visual_tokens, available / 1e9,
            RESIZE if reading.is_resizable else "", half, FEWER_BITS,
        )  # fmt: skip


def weights_bytes(tensors: Mapping[str, RawTensor], dtype: mx.Dtype | None) -> int:
    """Bytes of a checkpoint's tensors once floating-point ones are in `dtype`."""
    total = 0
    for tensor in tensors.values():
        is_changed = dtype is not None and tensor.dtype in FLOATS
        total += prod(tensor.shape) * dtype.size if is_changed and dtype else tensor.nbytes
    return total


def preprocessor(folder: Path) -> Mapping[str, Any]:
    """What a folder says of its pictures; nothing where it cannot be read."""
    with suppress(UserError):
        content: Mapping[str, Any] = read_json(folder / PREPROCESSOR_CONFIG)
        return content
    return {}


def estimate(
    config: Mapping[str, Any], dtype: mx.Dtype | None, pictures: Mapping[str, Any] | None = None
) -> Reading:
    """What reading takes of a picture as large as the config says, in as many tiles as that or
    the preprocessor (`pictures`) says, else of SIDE x SIDE pixels; 0 for a config without sizes.
    """
    text, vision = {**config, **_part(config, "text_config")}, _part(config, "vision_config")
    itemsize = (dtype or mx.float16).size
    patches = (_whole(vision, "image_size", SIDE) // _whole(vision, "patch_size", PATCH)) ** 2
    tiles = _tiles(config, vision, pictures or {})
    N = tiles * _visual_tokens(config, vision, patches)
    rows = N + TEXT
    tower = _layer(vision, tiles * patches, patches)
    prompt = _layer(text, min(rows, PREFILL_STEP_SIZE), rows) + _whole(text, "vocab_size", 0)
    nbytes = itemsize * (max(tower, prompt) + rows * _row_size(text))
    is_fixed = "image_size" in vision or any(name in config for name in SOFT_TOKENS)
    return Reading(N, nbytes, not is_fixed)


def _tiles(
    config: Mapping[str, Any], vision: Mapping[str, Any], pictures: Mapping[str, Any]
) -> int:
    """The most tiles that a picture is cut into, with the whole picture: InternVL's number, those
    of Idefics3's longest edge, or of the largest of LLaVA's shapes in pixels; 1 where nothing says
    it."""
    if most := _whole(config, "max_dynamic_patch", 0):
        return most + 1
    edge, tile = (
        _whole(_part(pictures, name), "longest_edge", 0) for name in ("size", "max_image_size")
    )
    if edge and tile and pictures.get("do_image_splitting", True):
        return 1 + ceil(edge / tile) ** 2
    side, shapes = _whole(vision, "image_size", SIDE), config.get("image_grid_pinpoints")
    sizes = [
        max(1, width // side) * max(1, height // side)
        for shape in (shapes if isinstance(shapes, list) else ())
        if isinstance(shape, list) and [*map(type, shape)] == [int, int]
        for width, height in [shape]
    ]
    return 1 + max(sizes) if sizes else 1


def _visual_tokens(config: Mapping[str, Any], vision: Mapping[str, Any], patches: int) -> int:
    """Of the picture's patches; several may become one."""
    both = {**config, **_part(config, "text_config")}
    if tokens := max(_whole(both, name, 0) for name in SOFT_TOKENS):
        return tokens
    of_config = (_whole(config, name, 1) for name in ("scale_factor", "downsample_factor"))
    side = _whole(vision, "spatial_merge_size", 0) or max(of_config)
    ratio = config.get("downsample_ratio")
    share = ratio**2 if isinstance(ratio, float) and 0 < ratio <= 1 else 1 / side**2
    return max(1, int(patches * share))


def _layer(part: Mapping[str, Any], rows: int, attended: int) -> int:
    """Numbers that a layer holds at once: its rows' features and its network's, or the scores."""
    D = _whole(part, "hidden_size", 0) or _whole(part, "embed_dim", 0)
    heads = _whole(part, "num_attention_heads", 0) or _whole(part, "num_heads", 0)
    features = rows * (4 * D + 2 * _whole(part, "intermediate_size", 4 * D))
    scores = 2 * heads * rows * attended if on_cpu() else 0
    return features + scores


def _row_size(text: Mapping[str, Any]) -> int:
    """Numbers of a cache row in all layers."""
    heads = _whole(text, "num_attention_heads", 1)
    width = _whole(text, "head_dim", _whole(text, "hidden_size", 0) // heads)
    layers = _whole(text, "num_hidden_layers", 0)
    return 2 * layers * _whole(text, "num_key_value_heads", heads) * width


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = config.get(name)
    return part if isinstance(part, Mapping) else {}


def _whole(part: Mapping[str, Any], name: str, default: int) -> int:
    """A size in a config, which may hold anything."""
    value = part.get(name)
    is_size = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 24
    return value if is_size and isinstance(value, int) else default
