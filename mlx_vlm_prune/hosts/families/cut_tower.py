"""Families whose tower's layers run one by one from here, so that tokens may leave between them.

Shapes: I pictures, N visual tokens of g = m x m patches each, K left of them, S rows of the tower
(with CLS where there is one), D features, H heads, d head size.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ...checkpoints.errors import UserError
from ...models.towers.pixels import patch_greys, patch_pixels
from ...models.towers.signals import Cut, TowerPass
from ...models.towers.vit import key_mask
from ...pruners.contract import Reduction, Signals
from ..language_layers import split_heads
from ..prepared_inputs import PreparedInputs
from ..tower_cuts import Attended, TowerCuts, into_groups, run_layers, views_alike
from ..views import View, make_views
from .tower import TowerHost


class CutTowerHost(TowerHost):
    """A host with such a tower; a family defines `tower_pixels`, and what differs from SigLIP."""

    why_no_encoder_methods = None

    def tower_pixels(self, inputs: PreparedInputs) -> mx.array:
        """The pictures as the tower reads them, (I, H, W, 3)."""
        raise NotImplementedError

    @property
    def tower_has_cls(self) -> bool:
        return False

    @property
    def token_patches(self) -> int:
        """m: patches along the side of a visual token."""
        return 1

    def enter_tower(self, pixels_IHW3: mx.array, inputs: PreparedInputs) -> mx.array:
        """The rows that the first layer reads, (I, S, D)."""
        x_ISD: mx.array = self.tower.embeddings(pixels_IHW3)
        return x_ISD

    def leave_tower(self, x_IKgD: mx.array) -> mx.array:
        """The visual tokens (I, K, …) of the patches behind the last layer."""
        return x_IKgD.flatten(2)

    def encode_with_cuts(
        self, inputs: PreparedInputs, want: Mapping[str, int | None], cuts: TowerCuts
    ) -> list[View]:
        """Pictures with the same cuts run together."""
        pixels_IHW3, m = self.tower_pixels(inputs), self.token_patches
        patch = self.model.config.vision_config.patch_size
        rows, columns = (side // (patch * m) for side in pixels_IHW3.shape[1:3])
        blank = Signals(mx.zeros((len(pixels_IHW3), rows * columns, 1)), (rows, columns))
        views = self._of_known_images(inputs, make_views(inputs, blank, pixels_IHW3))
        every_cut = cuts.of_views(views)
        if not any(every_cut):
            return self.encode_images(inputs, want)
        x_ISD = self.enter_tower(pixels_IHW3, inputs)
        for numbers in views_alike(every_cut):
            alike = mx.array(numbers)
            run = self._start(blank.grid, pixels_IHW3[alike], want, every_cut[numbers[0]])
            signals, kept = self._run(run, x_ISD[alike])
            for i, number in enumerate(numbers):
                views[number] = replace(
                    views[number], signals=signals.of_image(i), kept=kept and kept.of_image(i)
                )
        return views

    def _of_known_images(self, inputs: PreparedInputs, views: list[View]) -> list[View]:
        """The views with their images, whose tokens have a budget together. Raises UserError."""
        if not self.has_tiles or "num_patches_list" in inputs.extra:
            return views
        room = inputs.ids.count(self.image_token_id(inputs))
        if self.placeholder_unit == "token" and room != sum(view.N for view in views):
            raise UserError(
                "a method between the tower's layers must know which tiles are of one image; here"
                " they are of several prompts: give one prompt at a time"
            )
        return self.assign_tiles(inputs, views)

    def _start(
        self, grid: tuple[int, int], pixels_IHW3: mx.array, want: Mapping[str, int | None],
        cuts: list[Cut],
    ) -> TowerPass:  # fmt: skip
        """The pass, with the signals of the tower's input that methods want."""
        m, (images, N), entrance = self.token_patches, (len(pixels_IHW3), int(np.prod(grid))), {}
        if "patches" in want:
            embedding = self.tower.embeddings.patch_embedding
            entrance["patches_BND"] = embedding(pixels_IHW3).flatten(1, 2)
        size = self.model.config.vision_config.patch_size
        if "pixels" in want:
            entrance["pixels_BND"] = patch_pixels(pixels_IHW3, size)
        if "grey" in want:
            entrance["grey_BNP"] = patch_greys(pixels_IHW3, size)
        grouped: dict[str, Any] = {
            name: into_groups(x_IPD, grid, m).reshape(images, N, -1)
            for name, x_IPD in entrance.items()
        }
        signals = Signals(mx.zeros((images, N, 1)), grid, **grouped)
        return TowerPass(signals, want, self.depth, cuts, self.tower_has_cls, m * m)

    def _run(self, run: TowerPass, x_ISD: mx.array) -> tuple[Signals, Reduction | None]:
        """The visual tokens that are left with their signals, and what they are of the picture."""
        first, grid, m = run.first, run.signals.grid, self.token_patches
        patches_IPD = into_groups(x_ISD[:, first:], grid, m)
        x_ISD = mx.concatenate([x_ISD[:, :first], patches_IPD], axis=1)
        layers = self.encoder_layers
        x_ISD = run_layers(run, x_ISD, layers, partial(self._attend, run), self.feed_forward)
        if self.depth in run.want.values():
            behind = self.tower.encoder.layers[self.depth]
            q_IHSd, k_IHSd, _ = self.heads(behind, x_ISD)
            run.read(self.depth, q_IHSd, k_IHSd)
        x_IKgD = x_ISD[:, first:].reshape(len(x_ISD), -1, m * m, x_ISD.shape[-1])
        return run.signals.replace(x_BND=self.leave_tower(x_IKgD)), run.kept

    def _attend(self, run: TowerPass, number: int, x_ISD: mx.array) -> Attended:
        layer, mask = self.encoder_layers[number], key_mask(run.bias_BS, x_ISD.dtype)
        q, k, v = self.heads(layer, x_ISD)
        all_queries = None
        if (attended_ISD := run.attended(x_ISD, number)) is not x_ISD:
            every, k, v = self.heads(layer, attended_ISD)
            all_queries = partial(mx.array, every)
        y_IHSd = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
        y_ISD = y_IHSd.swapaxes(1, 2).reshape(x_ISD.shape)
        return Attended(self.project_attended(layer, y_ISD), q, k, v, all_queries=all_queries)

    def heads(self, layer: Any, x_ISD: mx.array) -> list[mx.array]:
        """Queries, keys and values, (I, H, S, d) each."""
        attention, x_ISD = layer.self_attn, layer.layer_norm1(x_ISD)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        return [split_heads(project(x_ISD), attention.num_heads) for project in projections]

    def project_attended(self, layer: Any, y_ISD: mx.array) -> mx.array:
        """What heads have read, side by side, as it is added to the rows."""
        return layer.self_attn.out_proj(y_ISD)

    def feed_forward(self, layer: Any, x_ISD: mx.array) -> mx.array:
        """What the rest of a layer adds."""
        return layer.mlp(layer.layer_norm2(x_ISD))
