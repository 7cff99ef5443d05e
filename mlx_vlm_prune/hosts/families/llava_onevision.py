"""LLaVA-OneVision: SigLIP over a picture of the whole image, and over its tiles.

After the projector mlx-vlm joins the tiles, cuts off the margin that the processor added, makes a
large mosaic smaller, and puts the embedding of a new line behind each of its rows. So methods
choose among embeddings here. New lines tell nothing of the image, and are left out as soon as
anything is.

Shapes: I images, T pictures (images and tiles), t tiles of one image, N patches of a picture,
n visual tokens of a mosaic, D features, C values of a token.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import mlx.core as mx
import numpy as np

from ...checkpoints.errors import UserError
from ...generation.tiles import Layout
from ...pruners.contract import Signals, token_axis
from ..prepared_inputs import PreparedInputs
from ..views import View
from .tower import TowerHost

LARGEST_RATIO = 1.1  # of a mosaic's side to the side that the model reads; mlx-vlm's


class LlavaOnevisionHost(TowerHost):
    whole_view = 0
    has_image_rows = True
    why_no_encoder_methods = (
        "it works between the tower's layers, behind which tiles become one picture that is cut and"
        " made smaller, so every patch must be there"
    )
    why_no_decoder_methods = "the embedding of a new line stands behind every row of an image"
    why_no_probe = "methods choose among what is joined behind its projector"

    @property
    def encoder_layers(self) -> Sequence[Any]:
        """Layers up to the one that gives the features."""
        layers, feature_layer = self.tower.encoder.layers, self.model.config.vision_feature_layer
        if not isinstance(feature_layer, int):
            raise UserError(f"vision_feature_layer is {feature_layer}; of several none is pruned")
        return layers[: range(len(layers) + 1)[feature_layer]]

    def encode_images(self, inputs: PreparedInputs, want: Mapping[str, int | None]) -> list[View]:
        model, config = self.model, self.model.config
        sizes = np.array(inputs.extra["image_sizes"]).reshape(-1, 2).tolist()
        pixels, counts = inputs.pixels, [len(inputs.pixels)]
        if pixels.ndim == 5:  # the fewer tiles are filled up
            counts = [1 + rows * columns for rows, columns in map(self._tiles, sizes)]
            pixels = mx.concatenate([x[:n] for x, n in zip(pixels, counts, strict=True)])
        pixels_THW3 = pixels.transpose(0, 2, 3, 1)
        *_, states = model.vision_tower(pixels_THW3, output_hidden_states=True)
        x_TND = model.multi_modal_projector(model._select_features(states))
        side = config.vision_config.image_size // config.vision_config.patch_size
        signals = self.signals(x_TND, want, states, grid=(side, side))
        views, begin = list[View](), 0
        for image, (size, count) in enumerate(zip(sizes, counts, strict=True)):
            whole = signals.of_image(begin)
            if count == 1:
                views.append(View(image, whole, pixels_THW3[begin], breaks=self._breaks(1)))
            else:
                views.append(View(image, whole, pixels_THW3[begin]))
                tiles = [signals.of_image(i) for i in range(begin + 1, begin + count)]
                joined = self._mosaic(tiles, size)
                views.append(View(image, joined, breaks=self._breaks(joined.grid[0])))
            begin += count
        return views

    def _breaks(self, rows: int) -> int:
        return 0 if self.model.image_newline is None else rows

    def _tiles(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of tiles of an image of (height, width)."""
        from mlx_vlm.models.llava_onevision.llava_onevision import get_anyres_image_grid_shape

        config = self.model.config
        rows, columns = get_anyres_image_grid_shape(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )
        return rows, columns

    def _mosaic(self, tiles: Sequence[Signals], size: Sequence[int]) -> Signals:
        """The signals of all tiles of an image as those of one picture."""
        joined = {
            name: mx.concatenate([tile.arrays[name] for tile in tiles]) for name in tiles[0].arrays
        }
        signals, grids = tiles[0].replace(**joined), list[tuple[int, int]]()

        def pack(x: mx.array, axis: int) -> mx.array:
            x_tNc = mx.moveaxis(x, axis, 1)
            rest = x_tNc.shape[2:]
            x_Chw = self._pack(x_tNc.reshape(*x_tNc.shape[:2], -1), size)
            grids.append((x_Chw.shape[1], x_Chw.shape[2]))
            return mx.moveaxis(x_Chw.flatten(1).T.reshape(1, -1, *rest), 1, axis)

        packed = signals.per_token(pack)
        x_1nD = pack(signals.x_BND, 1)
        means = {
            name: x.mean(axis=0, keepdims=True)
            for name, x in packed.arrays.items()
            if token_axis(name) is None
        }
        return packed.replace(**means, x_BND=x_1nD, grid=grids[-1])

    def _pack(self, x_tNC: mx.array, size: Sequence[int]) -> mx.array:
        """The values of the tiles' tokens as (C, rows, columns), by the steps of mlx-vlm."""
        from mlx_vlm.models.interpolate import resize_bilinear
        from mlx_vlm.models.llava_onevision.llava_onevision import unpad_image

        (rows, columns), side = self._tiles(size), int(x_tNC.shape[1] ** 0.5)
        x = x_tNC.reshape(rows, columns, side, side, -1).transpose(4, 0, 2, 1, 3)
        x_Chw = unpad_image(x.reshape(len(x), rows * side, columns * side), size)
        _, h, w = x_Chw.shape
        ratio = sqrt(h * w / (self.model.max_num_patches * side**2))
        if ratio > LARGEST_RATIO:
            fitted = int(h // ratio), int(w // ratio)
            x_hwC = resize_bilinear(x_Chw.transpose(1, 2, 0), fitted, antialias=False)
            x_Chw = x_hwC.transpose(2, 0, 1)
        return x_Chw

    def project(self, x_1KD: mx.array) -> mx.array:
        return x_1KD

    def image_embeddings(
        self, views: Sequence[View], x: Sequence[mx.array], is_full: bool
    ) -> mx.array:
        """The embeddings of all views in a row, with new lines only if nothing was pruned."""
        parts = list(x)
        if is_full:
            parts = [self._with_breaks(x, v.breaks) for x, v in zip(parts, views, strict=True)]
        return mx.concatenate(parts)

    def _with_breaks(self, x_ND: mx.array, breaks: int) -> mx.array:
        if not breaks:
            return x_ND
        x_rND = x_ND.reshape(breaks, -1, x_ND.shape[-1])
        line_D = self.model.image_newline.astype(x_ND.dtype)
        lines_r1D = mx.broadcast_to(line_D, (breaks, 1, len(line_D)))
        return mx.concatenate([x_rND, lines_r1D], axis=1).flatten(0, 1)

    def layout(self, views: int, size: tuple[int, int]) -> Layout | None:
        """A picture of the whole image alone; the mosaic beside it shows the same."""
        return Layout(1, 1) if views == 1 else None
