"""Qwen2-VL, whose tower sees all of an image in every layer; Qwen2.5-VL and Qwen3-VL start here.

The patches of all images stand in one row. Blocks of m x m neighbours follow one another, since
the merger makes one visual token of each; Qwen2.5-VL gathers these by windows on top.
The merger is the tower's last layer, so features and embeddings are the same tokens.

Shapes: S patches of all images, s of one, U = S / m^2 visual tokens, N of one image, D features,
H heads, d head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from ...models.projector import merge_patches
from ...models.towers.pixels import greys
from ...models.towers.signals import TowerPass, received_attention_in_windows
from ...pruners.contract import Signals
from ..host import Host
from ..language_layers import LanguageLayers, PositionIdLayers
from ..prepared_inputs import PreparedInputs
from ..tower_cuts import TowerCuts
from ..views import View
from .cut_qwen_tower import CutQwenTower
from .packed_patches import PackedPatches, heads


class Qwen2VLHost(Host):
    has_mrope = True
    why_no_encoder_methods = None
    why_no_clips = None
    why_no_probe = "patches are merged inside its tower, so there is no projector to ask"
    why_not_learned: ClassVar[str | None] = None
    language_layers_class: ClassVar[type[LanguageLayers] | None] = PositionIdLayers

    @property
    def tower(self) -> Any:
        return self.model.vision_tower

    @property
    def depth(self) -> int:
        return len(self.tower.blocks)

    @property
    def feature_dims(self) -> int | None:
        dims: int = self.model.config.vision_config.hidden_size
        return dims

    @property
    def token_side(self) -> int:
        side: int = self.model.config.vision_config.patch_size * self.tower.spatial_merge_size
        return side

    def project(self, x_1KD: mx.array) -> mx.array:
        return x_1KD

    def image_token_id(self, inputs: PreparedInputs) -> int:
        if inputs.is_clip:
            token: int = self.model.config.video_token_id
            return token
        return super().image_token_id(inputs)

    def join_embeddings(self, x: Sequence[mx.array], is_full: bool) -> mx.array:
        """The embeddings of all pictures in a row."""
        return mx.concatenate(list(x))

    def pack_patches(self, inputs: PreparedInputs) -> PackedPatches:
        """The patches of all images, as the tower's first layer reads them."""
        tower, grid_I3 = self.tower, inputs.grids_I3
        x_SD = tower.patch_embed(inputs.pixels.astype(tower.patch_embed.proj.weight.dtype))
        angles_Sa = tower.rot_pos_emb(grid_I3).reshape(len(x_SD), -1)
        sizes = [h * w for t, h, w in grid_I3.tolist() for _ in range(t)]
        ends = mx.array(np.cumsum([0, *sizes]), mx.int32)
        order_U = np.arange(len(x_SD) // tower.spatial_merge_size**2)
        return PackedPatches(x_SD, angles_Sa, lambda _: ends, order_U)

    def encode_images(self, inputs: PreparedInputs, want: Mapping[str, int | None]) -> list[View]:
        """All layers, and the queries and keys of those in `want`."""
        tower, packed, deepstack, added = self.tower, self.pack_patches(inputs), self.deepstack, []
        x_SD, layers = packed.x_SD, {layer for layer in want.values() if layer is not None}
        attended: dict[int, tuple[mx.array, mx.array]] = {}
        for i, block in enumerate(tower.blocks):
            if i in layers:
                attended[i] = heads(block, x_SD, packed.angles_Sa)[:2]
            x_SD = block(x_SD, cu_seqlens=packed.bounds(i), rotary_pos_emb=packed.angles_Sa)
            if i in deepstack:
                added.append(deepstack[i](x_SD))
        back_U = mx.array(np.argsort(packed.order_U))
        x_UD, added = tower.merger(x_SD)[back_U], [y_UD[back_U] for y_UD in added]
        views, m, begin = [], tower.spatial_merge_size, 0
        for i, (t, h, w) in enumerate(inputs.grids_I3.tolist()):
            end = begin + t * h * w // m**2
            signals = _image_signals(packed, attended, want, (t * h, w), m, range(begin, end))
            signals = signals.replace(x_BND=x_UD[None, begin:end], frames=t)
            views.append(View(i, signals, deepstack=tuple(y_UD[None, begin:end] for y_UD in added)))
            begin = end
        return views

    def encode_with_cuts(
        self, inputs: PreparedInputs, want: Mapping[str, int | None], cuts: TowerCuts
    ) -> list[View]:
        """One image after another, for tokens leave each by another number."""
        grids, m = inputs.extra["image_grid_thw"], self.tower.spatial_merge_size
        sizes = [(h // m, w // m) for _, h, w in grids.tolist()]
        blank = [Signals(mx.zeros((1, h * w, 1)), (h, w)) for h, w in sizes]
        views = [View(i, signals) for i, signals in enumerate(blank)]
        every_cut = cuts.of_views(views)
        if not any(every_cut):
            return self.encode_images(inputs, want)
        ends = np.cumsum([0, *(m * m * view.N for view in views)]).tolist()
        cut_views = []
        for i, (view, of_view) in enumerate(zip(views, every_cut, strict=True)):
            pixels, grid_13 = inputs.pixels[ends[i] : ends[i + 1]], grids[i : i + 1]
            alone = replace(inputs, pixels=pixels, extra={"image_grid_thw": grid_13})
            signals = view.signals.replace(**self._entrance(pixels, want))
            run = TowerPass(signals, want, self.depth, of_view, has_cls=False, group=m * m)
            tower = CutQwenTower(self.tower, self.pack_patches(alone), self.deepstack, run)
            cut_views.append(tower.encode(view))
        return cut_views

    def _entrance(self, pixels_SC: mx.array, want: Mapping[str, int | None]) -> dict[str, mx.array]:
        """The signals of the tower's input that methods want, of an image's visual tokens."""
        embed, entrance = self.tower.patch_embed, dict[str, mx.array]()
        if "patches" in want:
            entrance["patches_BND"] = embed(pixels_SC.astype(embed.proj.weight.dtype))
        shape = (len(pixels_SC), embed.in_channels, embed.temporal_patch_size, -1)
        frame_SP3 = pixels_SC.reshape(shape)[:, :, 0].swapaxes(1, 2)  # a picture is two alike
        if "pixels" in want:
            entrance["pixels_BND"] = frame_SP3.flatten(1)
        if "grey" in want:
            entrance["grey_BNP"] = greys(frame_SP3)
        g = self.tower.spatial_merge_size**2
        return {name: x.reshape(1, len(x) // g, -1) for name, x in entrance.items()}


def _image_signals(
    packed: PackedPatches, attended: Mapping[int, tuple[mx.array, mx.array]],
    want: Mapping[str, int | None], grid: tuple[int, int], m: int, tokens: range,
) -> Signals:  # fmt: skip
    """The signals of the image with these visual tokens: taken from its patches in raster order,
    then averaged over each m x m."""
    first, last = tokens.start * m**2, tokens.stop * m**2
    place_s = raster_places(packed.order_U[tokens.start : tokens.stop] - tokens.start, grid, m)
    at_s = mx.array(first + np.argsort(place_s))
    bare = Signals(mx.zeros((1, last - first, 1)), grid)
    run = TowerPass(bare, want, max(attended, default=0) + 1, (), has_cls=False)
    for layer, (q_HSd, k_HSd) in attended.items():
        ends = [int(b) for b in np.array(packed.bounds(layer)) if first <= b <= last]
        windows = [mx.array(place_s[a - first : b - first]) for a, b in pairwise(ends)]
        received = partial(received_attention_in_windows, windows)
        run.read(layer, q_HSd[None, :, at_s], k_HSd[None, :, at_s], received)
    return merge_patches(run.signals, (m, m))


def raster_places(order_N: np.ndarray, grid: tuple[int, int], m: int) -> np.ndarray:
    """The place in raster order (s,) of each patch of an image, which the tower holds visual token
    by visual token in `order_N`, m x m patches each."""
    token_N1, inner = order_N[:, None], np.arange(m * m)
    token_row, token_column = np.divmod(token_N1, grid[1] // m)
    return ((token_row * m + inner // m) * grid[1] + token_column * m + inner % m).reshape(-1)
