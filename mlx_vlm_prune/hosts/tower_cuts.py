"""Where visual tokens leave inside the tower of a model of mlx-vlm's, whose layers run one by one.

Behind most towers m x m patches become one visual token, so these leave together: a group. A tower
is driven from here only where tokens leave; nothing is put on the model.

Shapes: I pictures of one size, N visual tokens of a picture, g = m x m patches each, P = gN
patches, S rows at present (with CLS where there is one), D features, H heads, d head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..models.image_encoder import cuts_inside
from ..models.towers.signals import Cut, TowerPass
from ..pruners import Pipeline
from .views import View

Received = Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class Attended:
    """What a layer's attention adds to its rows (I, S, D), by which queries, keys and values
    (I, H, S, d); the rest is as `TowerPass.read` takes it."""

    y_ISD: mx.array
    q_IHSd: mx.array
    k_IHSd: mx.array
    v_IHSd: mx.array
    received: Received | None = None
    all_queries: Callable[[], mx.array] | None = None


@dataclass(frozen=True)
class TowerCuts:
    """The methods of a chain that work inside the tower, and how many tokens of views stay."""

    pipeline: Pipeline
    budgets: Callable[[Sequence[View]], list[int]]  # each view's K
    layers: tuple[int, int]  # those that tokens can leave between, and how many lie behind them

    def of_views(self, views: Sequence[View]) -> list[list[Cut]]:
        """The cuts of each view; none of one that keeps all. The views' tokens are not read.

        Raises UserError for a budget that cannot be kept.
        """
        return [
            cuts_inside(self.pipeline.budgets(view.N, K), view.N, self.layers)
            for view, K in zip(views, self.budgets(views), strict=True)
        ]


def views_alike(cuts: Sequence[list[Cut]]) -> list[list[int]]:
    """The numbers of the views that have the same cuts, and so run together; of a method by which
    an image decides how many of its tokens leave, each alone."""
    alike: dict[Any, list[int]] = {}
    for number, of_view in enumerate(cuts):
        key: Any = tuple((cut.layer, cut.place, cut.K) for cut in of_view)
        key = number if any(cut.pruner.adapts for cut in of_view) else key
        alike.setdefault(key, []).append(number)
    return list(alike.values())


def run_layers(
    run: TowerPass,
    x_ISD: mx.array,
    layers: Sequence[Any],
    attend: Callable[[int, mx.array], Attended],
    feed_forward: Callable[[Any, mx.array], mx.array],
    behind: Callable[[int, mx.array], None] = lambda number, x_ISD: None,
) -> mx.array:
    """The rows behind all layers, of the tokens that stay.

    `attend` is the attention of a layer, by its number; `feed_forward` what else a layer adds;
    `behind` is called with the rows behind each layer.
    """
    for number, layer in enumerate(layers):
        x_ISD = run.cut(x_ISD, number, "before")
        attended = attend(number, x_ISD)
        keys = run.read(
            number, attended.q_IHSd, attended.k_IHSd, attended.received, attended.all_queries,
            attended.v_IHSd,
        )  # fmt: skip
        x_ISD = run.cut(x_ISD + attended.y_ISD, number, "middle", keys)
        x_ISD = x_ISD + feed_forward(layer, x_ISD)
        behind(number, x_ISD)
    return run.given_back(x_ISD)


def into_groups(x_IPD: mx.array, grid: tuple[int, int], m: int) -> mx.array:
    """Patches in raster order, of a `grid` of visual tokens, group by group, (I, P, D)."""
    if m == 1:
        return x_IPD
    (rows, columns), (images, _, D) = grid, x_IPD.shape
    x_IrmcmD = x_IPD.reshape(images, rows, m, columns, m, D)
    return x_IrmcmD.swapaxes(2, 3).reshape(x_IPD.shape)
