"""The tower of Qwen2-VL and its successors, layer by layer over an image, as tokens leave it.

A visual token is a group of patches, one behind another in the rows. Here groups stand in raster
order, while the tower gathers them by windows: a group's rotation and its place in a window go
along with it, and what DeepStack adds to it too.

Shapes: N visual tokens of the image, K left, g patches of each, S = gK rows, D features, a angles.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ...models.towers.signals import TowerPass
from ...pruners.contract import Reduction
from ..padded_windows import PaddedWindows, windows_of
from ..tower_cuts import Attended, run_layers
from ..views import View
from .packed_patches import PackedPatches, heads


@dataclass
class CutQwenTower:
    """One image on its way through a tower; `packed` are its patches, alone."""

    tower: Any
    packed: PackedPatches
    deepstack: Mapping[int, Callable[[mx.array], mx.array]]
    run: TowerPass

    def encode(self, view: View) -> View:
        """The view with the visual tokens that are left."""
        self.tables: dict[tuple[int, ...], PaddedWindows] = {}
        x_1SD = self._in_raster_order(self.packed.x_SD)[None]
        self.angles_Sa = self._in_raster_order(self.packed.angles_Sa)
        x_1SD = run_layers(
            self.run, x_1SD, self.tower.blocks, self._attend,
            lambda block, x_1SD: block.mlp(block.norm2(x_1SD)), self._add_deepstack,
        )  # fmt: skip
        signals = self.run.signals.replace(x_BND=self.tower.merger(x_1SD[0])[None])
        deepstack = tuple(self.run.beside)
        return replace(view, signals=signals, deepstack=deepstack, kept=self.run.kept)

    def _attend(self, number: int, x_1SD: mx.array) -> Attended:
        """In windows where the layer has them."""
        run, block = self.run, self.tower.blocks[number]
        bias_S = None if run.bias_BS is None else run.bias_BS[0]
        q_HSd, k_HSd, v_HSd = heads(block, x_1SD[0], self._of_rows(self.angles_Sa, run.kept))
        kept, all_queries = run.kept, None
        if (attended_1SD := run.attended(x_1SD, number)) is not x_1SD:
            kept = run.absent.kept if run.absent else None  # before they left
            angles_Sa = self._of_rows(self.angles_Sa, kept)
            every_HSd, k_HSd, v_HSd = heads(block, attended_1SD[0], angles_Sa)
            all_queries = partial(mx.expand_dims, every_HSd, 0)
        if windows := self._windows(number, kept):
            asking = windows if kept is run.kept else self._windows(number, run.kept)
            assert asking
            y_HSd = windows.attend(q_HSd, k_HSd, v_HSd, bias_S, asking.place_S)
        else:
            mask = None if bias_S is None else bias_S[None, None, None].astype(q_HSd.dtype)
            y_HSd = _attend_to_all(q_HSd[None], k_HSd[None], v_HSd[None], mask)[0]
        y_1SD = block.attn.proj(y_HSd.swapaxes(0, 1).reshape(x_1SD.shape[1:]))[None]
        received = partial(windows.received, bias_S=bias_S) if windows else None
        return Attended(y_1SD, q_HSd[None], k_HSd[None], v_HSd[None], received, all_queries)

    def _windows(self, number: int, kept: Reduction | None) -> PaddedWindows | None:
        """Those of a layer, with the places of the rows that are left."""
        ends: Any = tuple(np.array(self.packed.bounds(number)).tolist())
        if len(ends) == 2:  # one, of all
            return None
        if ends not in self.tables:
            self.tables[ends] = windows_of(self.packed.order_U, ends, self.run.group)
        table = self.tables[ends]
        return replace(table, place_S=self._of_rows(table.place_S, kept))

    def _of_rows(self, x_S: mx.array, kept: Reduction | None) -> mx.array:
        """Of what the patches of the image have, in raster order, that of the rows left: of merged
        tokens that of the one which stands for them."""
        if kept is None:
            return x_S
        assert kept.index_BK is not None
        x_Ng = x_S.reshape(-1, self.run.group, *x_S.shape[1:])
        return x_Ng[kept.index_BK[0]].flatten(0, 1)

    def _in_raster_order(self, x_SD: mx.array) -> mx.array:
        x_NgD = x_SD.reshape(len(self.packed.order_U), -1, x_SD.shape[-1])
        return x_NgD[mx.array(np.argsort(self.packed.order_U))].flatten(0, 1)

    def _add_deepstack(self, number: int, x_1SD: mx.array) -> None:
        """Note what DeepStack adds by a layer's output."""
        if project := self.deepstack.get(number):
            self.run.beside.append(project(self.run.with_returning(x_1SD)[0])[None])


def _attend_to_all(
    q_1HSd: mx.array, k_1HSd: mx.array, v_1HSd: mx.array, mask: mx.array | None
) -> mx.array:
    """Heads of a size that has no kernel are padded, as mlx-vlm does."""
    from mlx_vlm.models.base import ensure_fused_sdpa

    y_1HSd: mx.array = ensure_fused_sdpa(q_1HSd, k_1HSd, v_1HSd, q_1HSd.shape[-1] ** -0.5, mask)
    return y_1HSd
