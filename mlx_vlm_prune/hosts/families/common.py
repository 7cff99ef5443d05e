"""What most families share: towers in the manner of CLIP and SigLIP, prompts, and arguments.

Shapes: I pictures, N patches, S tokens (with CLS where there is one), K kept, D features,
H heads, d head size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from PIL import Image

from ...pruners.contract import Signals
from ...towers.between import Between
from ..views import Inputs, View

INSIDE = "it works between the tower's layers, which is not yet there for mlx-vlm models"


def image_token(model: Any, inputs: Inputs) -> int:
    """The placeholder's id, which some call its index; some processors know better."""
    named = {**vars(model.config), **inputs.extra}
    return named["image_token_index" if "image_token_index" in named else "image_token_id"]


def embed(model: Any) -> Callable[[mx.array], mx.array]:
    return model.language_model.model.embed_tokens


def hand_over(
    model: Any, x: Sequence[mx.array], deep: Sequence[Sequence[mx.array]], is_full: bool
) -> dict:
    """All embeddings (K, D) in a row, as one picture's."""
    return {"cached_image_features": mx.concatenate(list(x))[None]}


def prepare(
    model: Any,
    processor: Any,
    text: str,
    pictures: Sequence[Image.Image],
    resize_shape: tuple[int, int] | None,
) -> Inputs:
    """As mlx-vlm itself does it: `text` has been through the chat template."""
    from mlx_vlm.utils import prepare_inputs, should_add_special_tokens

    made = prepare_inputs(
        processor,
        images=list(pictures) or None,
        prompts=text,
        image_token_index=getattr(model.config, "image_token_index", None),
        resize_shape=resize_shape,
        add_special_tokens=should_add_special_tokens(model.config.model_type, processor),
    )
    ids, mask, pixels = (made.pop(x, None) for x in ("input_ids", "attention_mask", "pixel_values"))
    ids = mx.array(ids).reshape(-1)
    mask = mx.ones((1, len(ids)), mx.int32) if mask is None else mask
    return Inputs(np.array(ids).tolist(), mask, pixels, len(pictures), made)


def signals(
    x_IND: mx.array,
    grid: tuple[int, int],
    want: Mapping[str, int | None],
    layers: Sequence[Any],
    inputs: Sequence[Any],
    has_cls: bool,
    read: Callable[[Any, mx.array], tuple[mx.array, mx.array]] | None = None,
) -> Signals:
    """The signals asked for, of layers whose `inputs` (I, S, D) are at hand.

    Only the queries and keys of the layers they are read of are computed again.
    """
    run = Between(Signals(x_IND, grid), want, len(layers), (), has_cls)
    for at in sorted(set(run.want.values())):
        run.read(at, *(read or queries_and_keys)(layers[at], inputs[at]))
    return run.signals


def queries_and_keys(layer: Any, x_ISD: mx.array) -> tuple[mx.array, mx.array]:
    """(I, H, S, d) each."""
    own, x_ISD = layer.self_attn, layer.layer_norm1(x_ISD)
    return split(own.q_proj(x_ISD), own.num_heads), split(own.k_proj(x_ISD), own.num_heads)


def split(x_ISD: mx.array, heads: int) -> mx.array:
    """(I, S, D) as (I, H, S, d)."""
    return x_ISD.reshape(*x_ISD.shape[:2], heads, -1).swapaxes(1, 2)


@dataclass(frozen=True)
class Family:
    """What has to be known of a family; each function takes the model first."""

    depth: Callable[[Any], int]  # how many layers of the tower signals can be read of
    see: Callable[[Any, Inputs, Mapping[str, int | None]], list[View]]  # the tower run
    project: Callable[[Any, mx.array], mx.array]  # visual tokens (1, K, D) to embeddings
    hand_over: Callable[..., dict[str, Any]] = hand_over  # those as arguments of mlx-vlm's
    prepare: Callable[..., Inputs] = prepare  # a prompt and pictures to ids and pixels
    embed: Callable[[Any], Callable[[mx.array], mx.array]] = embed
    image_token: Callable[[Any, Inputs], int] = image_token
    has_mrope: bool = False  # do positions have three axes, and come from outside?
    placeholders: Literal["token", "image", "all"] = "token"  # for what there is one of them
    inside: str = INSIDE  # why nothing leaves between the tower's layers
    inner: Any = None  # how the language model's layers are driven; None: not from here
