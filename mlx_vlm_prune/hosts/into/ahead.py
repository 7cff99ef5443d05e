"""The rows that are gone stand ahead of the others, and the language model passes over them.

mlx-vlm's server counts a prompt by its ids, and what it reads at once it pads by that number. So a
prompt keeps its length, and in a batch the rows ahead are padding, which the cache is told. They
are NaN and infinities: whatever forgets to pass over them gives NaN, never a wrong answer, and the
NaN of a model that is broken is no such row.

Shapes: B prompts, L rows of each, n rows of a piece, D features.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_vlm.models import llava as stock
from mlx_vlm.models.base import InputEmbeddingsFeatures

ANEW = "a prompt that lost rows has fewer of them than ids, so all of it is read"  # mlx-vlm logs it


@dataclass
class Features(InputEmbeddingsFeatures):
    """mlx-vlm's, and how many rows of each prompt are gone."""

    gone_B: Any = None

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"gone_B": self.gone_B}


def lengthened(found: Any, L: int) -> Any:
    """The prompts (B, n, D) in L rows again, where there were as many."""
    x_BnD = found.inputs_embeds
    B, n, D = x_BnD.shape
    gone = max(0, L - n)
    nobody_D = mx.where(mx.arange(D) == 0, mx.nan, mx.inf).astype(x_BnD.dtype)
    x_BLD = mx.concatenate([mx.broadcast_to(nobody_D, (B, gone, D)), x_BnD], axis=1)
    told = {**vars(found), "inputs_embeds": x_BLD, "gone_B": mx.full(B, gone)}
    if not hasattr(stock.Model, "chunked_prefill_policy"):  # nobody reads the mask, and those of
        told["attention_mask_4d"] = None  # different sizes keep prompts apart, as PaliGemma needs
    return Features(**told)


def passed_over(x_BnD: mx.array, cache: Any, gone_B: Any) -> int:
    """How many rows of this piece nobody reads; a batch's cache hears how each prompt is padded."""
    if gone_B is None or not cache or not hasattr(cache[0], "left_padding"):  # one prompt
        return int((mx.isnan(x_BnD[0, :, 0]) & (x_BnD[0, :, 1:] == mx.inf).all(axis=-1)).sum())
    if cache[0].keys is not None:
        return 0
    n, is_ring = x_BnD.shape[1], any(hasattr(layer, "max_size") for layer in cache)
    first = min(n - is_ring, int((cache[0].left_padding + gone_B).min()))  # a ring is never empty
    for layer in cache:
        layer.prepare(left_padding=[g * (first < n) - first for g in gone_B.tolist()])
    return first


def there(x_BnD: mx.array, first: int, cache: Any) -> mx.array:
    """The rows that are read; zeros for those that pad a batch: they stand before position 0."""
    x_BnD = x_BnD[:, first:]
    if not cache or not hasattr(cache[0], "left_padding"):
        return x_BnD
    at_Bn = cache[0].offset[:, None] + mx.arange(x_BnD.shape[1])
    return mx.where(at_Bn[..., None] < 0, 0, x_BnD)
