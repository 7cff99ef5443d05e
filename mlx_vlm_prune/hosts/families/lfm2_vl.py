"""LFM2-VL: SigLIP 2 over an image, or over its tiles and a view of all of it.

m x m patches make one visual token. Most layers of the language model are short convolutions, which
hold the last few rows.

Shapes: T views, P patches with padding, s those of one view, N visual tokens, D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ...checkpoints.errors import UserError
from ...generation.tiles import Layout, nearest_layout
from ..prepared_inputs import PreparedInputs, ProcessorOptions
from ..views import View, assign_images
from .tower import TowerHost


class Lfm2VLHost(TowerHost):
    projects_views_apart = True
    why_not_counted = "most of its layers do not attend"
    why_no_decoder_methods = (
        "most layers of its language model are convolutions, which mix a row with its neighbours:"
        " no row may leave between them"
    )

    @property
    def tower(self) -> Any:
        return self.model.vision_tower

    @property
    def mask_layers(self) -> Sequence[int]:
        return (self.language.model.fa_idx,)

    def encode_images(self, inputs: PreparedInputs, want: Mapping[str, int | None]) -> list[View]:
        grids = np.array(inputs.extra["spatial_shapes"]).tolist()
        states, _, x_TPD = self.tower(
            inputs.pixels,
            output_hidden_states=True,
            spatial_shapes=inputs.extra["spatial_shapes"],
            pixel_attention_mask=inputs.extra["pixel_attention_mask"],
        )
        m, views = self._merged, []
        for t, (rows, columns) in enumerate(grids):
            if rows % m or columns % m:
                raise UserError(f"a view has {rows} x {columns} patches; {m} must divide both")
            s = rows * columns
            x_1ND = self.model.pixel_unshuffle(x_TPD[t, :s].reshape(1, rows, columns, -1))
            x_1ND = x_1ND.reshape(1, -1, x_1ND.shape[-1])
            layer_inputs = [state_TPD[t : t + 1, :s] for state_TPD in states]
            signals = self.signals(x_1ND, want, layer_inputs, grid=(rows // m, columns // m), m=m)
            views.append(View(0, signals, self._picture(inputs.pixels[t, :s], rows, columns)))
        counts = inputs.extra.get("num_patches_list", [len(views)])
        return assign_images(views, counts)

    @property
    def _merged(self) -> int:
        """Patches along the side of a visual token."""
        m: int = self.model.config.downsample_factor
        return m

    def _picture(self, patches_sD: mx.array, rows: int, columns: int) -> mx.array:
        """The pixels (H, W, 3) of a view's patches."""
        side = self.model.config.vision_config.patch_size
        x = patches_sD.reshape(rows, columns, side, side, 3)
        return x.swapaxes(1, 2).reshape(rows * side, columns * side, 3)

    def prepare(
        self, text: str, images: Sequence[Image.Image], options: ProcessorOptions
    ) -> PreparedInputs:
        """With the number of views of each image."""
        inputs = super().prepare(text, images, options)
        if inputs.pixels is None:
            return inputs
        grids, area = np.array(inputs.extra["spatial_shapes"]).tolist(), self._merged**2
        counts = self._count_views(inputs, [rows * columns // area for rows, columns in grids])
        return replace(inputs, extra={**inputs.extra, "num_patches_list": counts})

    def assign_tiles(self, inputs: PreparedInputs, views: list[View]) -> list[View]:
        sizes = [view.N for view in views]
        return assign_images(views, self._count_views(inputs, sizes))

    def _count_views(self, inputs: PreparedInputs, sizes: Sequence[int]) -> list[int]:
        """How many views, of N visual tokens each in `sizes`, are of each image.

        Between two views of an image stands one word at most, which says where in it the next one
        lies; between images stand the end of one and the beginning of the other.
        """
        rows = np.flatnonzero(np.array(inputs.ids) == self.image_token_id(inputs))
        tokens = [len(part) for part in np.split(rows, np.flatnonzero(np.diff(rows) > 2) + 1)]
        counts, ends = [0] * len(tokens), np.cumsum(tokens)
        for end in np.cumsum(sizes).tolist():
            counts[min(int(np.searchsorted(ends, end)), len(ends) - 1)] += 1
        return counts

    def layout(self, views: int, size: tuple[int, int]) -> Layout:
        return nearest_layout(views, size)

    def project(self, x_1KD: mx.array) -> mx.array:
        return self.model.multi_modal_projector(x_1KD)

    def join_embeddings(self, x: Sequence[mx.array], is_full: bool) -> mx.array:
        """The embeddings of all views in a row."""
        return mx.concatenate(list(x))
