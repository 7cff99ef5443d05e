"""Qwen2-VL, whose tower sees all of an image in every layer; Qwen2.5-VL and Qwen3-VL start here.

The patches of all images stand in one row. Blocks of m x m neighbours follow one another, since
the merger makes one visual token of each; Qwen2.5-VL gathers these by windows on top.
The merger is the tower's last layer, so features and embeddings are the same tokens.

Shapes: S patches of all images, s of one, U = S / m^2 visual tokens, N of one image, D features,
H heads, d head size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from ...models.projector import merge_patches
from ...models.towers.signals import TowerPass
from ...pruners.contract import Signals
from ..host import Host
from ..language_layers import LanguageLayers, PositionIdLayers
from ..prepared_inputs import PreparedInputs
from ..views import View

WHY_NO_ENCODER_METHODS = (
    "it works between the tower's layers, where the patches of all images are packed in one row"
    " and m x m of them become one visual token, so all must be there"
)


@dataclass(frozen=True)
class PackedPatches:
    """The patches of all images in the tower's order."""

    x_SD: mx.array
    angles_Sa: mx.array  # of rotation
    bounds: Callable[[int], mx.array]  # of a layer: where each window of attention begins
    order_U: np.ndarray  # the visual token, counted over images, at each place


class Qwen2VLHost(Host):
    has_mrope = True
    why_no_encoder_methods = WHY_NO_ENCODER_METHODS
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

    def join_embeddings(self, x: Sequence[mx.array], is_full: bool) -> mx.array:
        """The embeddings of all pictures in a row."""
        return mx.concatenate(list(x))

    def pack_patches(self, inputs: PreparedInputs) -> PackedPatches:
        """The patches of all images, as the tower's first layer reads them."""
        tower, grid_I3 = self.tower, inputs.extra["image_grid_thw"]
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
                attended[i] = _queries_and_keys(block, x_SD, packed.angles_Sa)
            x_SD = block(x_SD, cu_seqlens=packed.bounds(i), rotary_pos_emb=packed.angles_Sa)
            if i in deepstack:
                added.append(deepstack[i](x_SD))
        back_U = mx.array(np.argsort(packed.order_U))
        x_UD, added = tower.merger(x_SD)[back_U], [y_UD[back_U] for y_UD in added]
        views, m, begin = [], tower.spatial_merge_size, 0
        for i, (_, h, w) in enumerate(inputs.extra["image_grid_thw"].tolist()):
            end = begin + h * w // m**2
            signals = _image_signals(packed, attended, want, (h, w), m, range(begin, end))
            signals = signals.replace(x_BND=x_UD[None, begin:end])
            views.append(View(i, signals, deepstack=tuple(y_UD[None, begin:end] for y_UD in added)))
            begin = end
        return views


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
        run.read(layer, q_HSd[None, :, at_s], k_HSd[None, :, at_s], windows)
    return merge_patches(run.signals, (m, m))


def raster_places(order_N: np.ndarray, grid: tuple[int, int], m: int) -> np.ndarray:
    """The place in raster order (s,) of each patch of an image, which the tower holds visual token
    by visual token in `order_N`, m x m patches each."""
    token_N1, inner = order_N[:, None], np.arange(m * m)
    token_row, token_column = np.divmod(token_N1, grid[1] // m)
    return ((token_row * m + inner // m) * grid[1] + token_column * m + inner % m).reshape(-1)


def _queries_and_keys(block: Any, x_SD: mx.array, angles_Sa: mx.array) -> tuple[mx.array, mx.array]:
    """(H, S, d) each, rotated as in the block."""
    qkv = block.attn.qkv(block.norm1(x_SD)).reshape(len(x_SD), 3, block.attn.num_heads, -1)
    q_SHd, k_SHd = qkv[:, 0], qkv[:, 1]
    return rotate(q_SHd, angles_Sa).swapaxes(0, 1), rotate(k_SHd, angles_Sa).swapaxes(0, 1)


def rotate(x_SHd: mx.array, angles_Sa: mx.array) -> mx.array:
    """Rotate features in pairs (i, i + d / 2)."""
    cos, sin = (mx.tile(f(angles_Sa)[:, None], (1, 1, 2)) for f in (mx.cos, mx.sin))
    half = x_SHd.shape[-1] // 2
    crossed = mx.concatenate([-x_SHd[..., half:], x_SHd[..., :half]], axis=-1)
    return (x_SHd * cos + crossed * sin).astype(x_SHd.dtype)
