"""Gemma 4: pictures of any shape, of whose patches m x m make one visual token, without padding.

Small ones take a second embedding of each row into every layer; in the row of a visual token it is
that of the id 0. In large ones the rows of an image see one another.

Shapes: I pictures of one shape, P patches, N visual tokens, S = P patches of the tower, D features,
H heads, d head size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ...checkpoints.errors import UserError
from ...pruners.contract import Signals
from ..dropped_rows import MEDIA
from ..prepared_inputs import PreparedInputs
from ..views import View
from .tower import TowerHost


class Gemma4Host(TowerHost):
    why_not_counted = "its layers are of several sizes"
    per_row_inputs = (MEDIA,)
    limits = (
        "in its large models, where rows of an image attend to each other, prompts share a batch"
        " only when equally long"
    )
    why_no_decoder_methods = (
        "its last layers read the keys of earlier ones, where all rows must still be"
    )

    @property
    def tower(self) -> Any:
        return self.model.vision_tower

    @property
    def token_side(self) -> int:
        side: int = self.tower.patch_size * self.tower.pooling_kernel_size
        return side

    @property
    def mask_layers(self) -> Sequence[int]:
        """The first layer of each kind: with a window of attention, and without."""
        kinds = self.language.config.layer_types
        return sorted(kinds.index(kind) for kind in set(kinds))

    @property
    def is_bidirectional(self) -> bool:
        return bool(self.language.config.use_bidirectional_attention == "vision")

    def encode_images(self, inputs: PreparedInputs, want: Mapping[str, int | None]) -> list[View]:
        """Pictures of one shape at once, others one by one, as mlx-vlm does."""
        if inputs.extra.get("image_position_ids") is not None:
            raise UserError("this gemma4 processor gives patches; mlx-vlm's own gives pictures")
        pixels = inputs.pixels
        groups = [x[None] for x in map(mx.array, pixels)] if isinstance(pixels, list) else [pixels]
        views: list[View] = []
        for pixels_I3HW in groups:
            signals = self._encode(pixels_I3HW, want)
            views += [View(len(views) + i, signals.of_image(i)) for i in range(len(pixels_I3HW))]
        return views

    def _encode(self, pixels_I3HW: mx.array, want: Mapping[str, int | None]) -> Signals:
        """By the steps of the tower, with the input of every layer."""
        tower, m = self.tower, self.tower.pooling_kernel_size
        images, _, *sides = pixels_I3HW.shape
        if any(side % self.token_side for side in sides):
            raise UserError(f"a gemma4 picture has {sides} pixels; {self.token_side} must divide")
        rows, columns = (side // tower.patch_size for side in sides)
        P = rows * columns
        positions_IP2 = mx.broadcast_to(_positions(rows, columns), (images, P, 2))
        is_padding_IP = mx.zeros((images, P), mx.bool_)
        x_IPD = tower.patch_embedder(pixels_I3HW, positions_IP2, is_padding_IP)
        mask_I1PP = mx.zeros((images, 1, P, P), x_IPD.dtype)
        states = [x_IPD]
        for layer in self.encoder_layers:
            states.append(layer(states[-1], positions_IP2, mask_I1PP))
        x_IND, _ = tower.pooler(states[-1], positions_IP2, is_padding_IP, output_length=P // m**2)
        if tower.config.standardize:
            x_IND = (x_IND - tower.std_bias) * tower.std_scale
        return self.signals(x_IND, want, states, grid=(rows // m, columns // m), m=m)

    def queries_and_keys(
        self, layer: Any, x_ISD: mx.array, grid: tuple[int, int]
    ) -> tuple[mx.array, mx.array]:
        """Queries are as long as methods expect, which divide products by the root of d."""
        from mlx_vlm.models.gemma4.vision import apply_multidimensional_rope

        attention, x_ISD = layer.self_attn, layer.input_layernorm(x_ISD)
        positions_1S2, d = _positions(*grid), attention.head_dim
        parts = []
        for which in ("q", "k"):
            x_ISHd = getattr(attention, f"{which}_proj")(x_ISD)
            x_ISHd = getattr(attention, f"{which}_norm")(x_ISHd.reshape(*x_ISD.shape[:2], -1, d))
            x_ISHd = apply_multidimensional_rope(
                x_ISHd, positions_1S2, attention.rope_base_frequency
            )
            x_IHSd = x_ISHd.swapaxes(1, 2)
            parts.append(mx.repeat(x_IHSd, attention.num_heads // x_IHSd.shape[1], axis=1))
        return parts[0] * d**0.5, parts[1]

    def project(self, x_1KD: mx.array) -> mx.array:
        return self.model.embed_vision(x_1KD)


def _positions(rows: int, columns: int) -> mx.array:
    """Column and row of every patch, (1, P, 2)."""
    at_row, at_column = np.divmod(np.arange(rows * columns), columns)
    return mx.array(np.stack([at_column, at_row], axis=-1).astype(np.int32))[None]
