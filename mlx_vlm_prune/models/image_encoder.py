"""From pixels to the tower's end, on which way pictures may shrink and tokens may leave.

Shapes: I images, N visual tokens, K kept of each image.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import mlx.core as mx
from mlx import nn

from ..checkpoints.config import VLMConfig
from ..checkpoints.dual_encoder import DualEncoderConfig
from ..checkpoints.errors import UserError
from ..inputs.resample import shrink
from ..machine.clock import end_part
from ..pruners import Pipeline, Pruner, Stage, StepBudgets, downsample
from .towers.signals import Cut, Encoded
from .towers.vit import VisionTower


class ImageEncoder(nn.Module):
    """What models with a tower share: the steps of a chain up to the tower's end."""

    config: VLMConfig | DualEncoderConfig
    tower: VisionTower

    @property
    def merge(self) -> tuple[int, int]:
        """How many patches, down and across, one visual token is made of."""
        return 1, 1

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        (rows, columns), (down, across) = self.config.vision.grid, self.merge
        return rows // down, columns // across

    @property
    def N(self) -> int:
        """Visual tokens of one image."""
        return prod(self.grid)

    def run_tower(self, pixels_IHW3: mx.array, pipeline: Pipeline, budgets: StepBudgets) -> Encoded:
        """The tower's output, of patches; what was kept is of the whole image."""
        grids, cuts = self.plan_tower(budgets)
        kept = None
        for grid in grids:
            pixels_IHW3 = self.shrink_pixels(pixels_IHW3, grid)
            kept = downsample.block_means(self.grid, grid, len(pixels_IHW3))
        want = pipeline.signal_layers(self.config.vision.depth, self.config.vision.layers_behind)
        encoded = end_part("vision", self.tower(pixels_IHW3, want, cuts))
        if encoded.kept:
            kept = encoded.kept.after(kept, self.N) if kept else encoded.kept
        return replace(encoded, kept=kept)

    def plan_tower(self, budgets: StepBudgets) -> tuple[list[tuple[int, int]], list[Cut]]:
        """The grids to which pictures shrink, one after another, and the cuts inside the tower.

        Raises UserError where tokens cannot leave inside this tower.
        """
        grids = smaller_grids(self.grid, budgets)
        n = prod(grids[-1]) if grids else self.N
        for step, _, _ in steps_inside(budgets, n)[:1]:
            if self.merge != (1, 1):
                raise UserError(
                    f"{step.name} works inside the tower; behind this one neighbouring patches"
                    " become one visual token, so all must be there: choose another method"
                )
        vision = self.config.vision
        return grids, cuts_inside(budgets, n, (vision.depth, vision.layers_behind))

    def shrink_pixels(self, pixels_IHW3: mx.array, grid: tuple[int, int]) -> mx.array:
        """Pictures of which the tower makes a smaller grid of visual tokens."""
        patch, (down, across) = self.config.vision.patch_size, self.merge
        return shrink(pixels_IHW3, (grid[0] * down * patch, grid[1] * across * patch))


def smaller_grids(grid: tuple[int, int], budgets: StepBudgets) -> list[tuple[int, int]]:
    """The grids to which a picture of `grid` visual tokens shrinks, one after another."""
    grids, n = list[tuple[int, int]](), prod(grid)
    for _, K in budgets.at(Stage.IMAGE):
        if n > K:
            grids.append(downsample.smaller_grid(grid, K))
            n = prod(grids[-1])
    return grids


def steps_inside(budgets: StepBudgets, n: int) -> list[tuple[Pruner, int, int]]:
    """The methods by which tokens leave inside a tower that is given n: each with how many there
    are by then, and how many it leaves."""
    steps = []
    for step, left in budgets.at(Stage.ENCODER):
        if n > left:
            steps.append((step, n, left))
            n = n if budgets.gives_back(step) else left
    return steps


def cuts_inside(budgets: StepBudgets, n: int, layers: tuple[int, int]) -> list[Cut]:
    """Where tokens leave between a tower's layers; `layers` are those that signals can be taken
    from, and how many lie behind them. Raises UserError."""
    cuts = list[Cut]()
    for step, there, left in steps_inside(budgets, n):
        whole, returns = budgets.whole_layers(step, *layers), budgets.gives_back(step)
        places = step.call(step.method.cuts, layers[0], there, left)
        cuts += [Cut(layer, place, K, step, whole, returns) for layer, place, K in places]
    check_order(cuts)
    return cuts


def check_order(cuts: Sequence[Cut]) -> None:
    """Raise UserError where tokens leave among those of which some may come back, or by a method
    of the chain ahead of those that leave by an earlier one: each counts on what the earlier ones
    leave. The cuts are in the order of the chain."""
    for cut in cuts:
        for other in cuts if cut.whole or cut.gives_back else ():
            if other.pruner is not cut.pruner and other.layer >= cut.layer:
                raise UserError(
                    f"{cut.pruner.name} knows all tokens that left the tower from layer"
                    f" {cut.layer} on, and {other.pruner.name} lets some go at layer {other.layer};"
                    f" they cannot stand in one chain"
                )
    for number, cut in enumerate(cuts):
        for later in cuts[number + 1 :]:
            is_ahead = (later.layer, later.place) < (cut.layer, cut.place)  # "before", "middle"
            if later.pruner is not cut.pruner and is_ahead:
                raise UserError(
                    f"{later.pruner.name} chooses among what {cut.pruner.name} leaves at layer"
                    f" {cut.layer} of the tower, and would do so at layer {later.layer} already;"
                    f" they cannot stand in this order"
                )
