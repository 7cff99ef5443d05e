"""Predictions of time and memory for any K, by straight lines between the runs of a calibration.

The vision tower and the pruner are predicted from K. The prefill is predicted from its rows: the
text, and K tokens of every image (for a decoder method K is the average over layers).

Shapes: N visual tokens of an image, K kept, S settings.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

PARTS = ("vision", "pruner", "prefill")  # of the time to the first token, after opening the images

Setting = tuple[int, int, int]  # K of each image's N tokens, tokens of text, images
Table = dict[str, np.ndarray]  # a row per setting; the columns are K, text, images and PARTS


@dataclass(frozen=True)
class Run:
    """One timed run: each part's ms, and the most bytes it held beside the weights and pixels."""

    K: int
    text: int
    images: int
    ms: Mapping[str, float]
    nbytes: Mapping[str, float]

    @property
    def setting(self) -> Setting:
        return self.K, self.text, self.images


def most_run(runs: Sequence[Run]) -> tuple[int, int]:
    """The most text, and the most images, of all runs."""
    return max(run.text for run in runs), max(run.images for run in runs)


def tabulate(runs: Sequence[Run], figure: str, statistic: Callable, in_tower: bool) -> Table:
    """A statistic of "ms" or "nbytes" over the runs of each setting, K ascending.

    Where the tower's work does not depend on K, its figure for one image is the median of all K.
    """
    settings = sorted({run.setting for run in runs})
    table = dict(zip(("K", "text", "images"), np.array(settings).T, strict=True))
    for part in PARTS:
        values = [[getattr(r, figure)[part] for r in runs if r.setting == s] for s in settings]
        table[part] = np.array([statistic(value) for value in values], dtype=float)
    if not in_tower:
        single = table["images"] == 1
        table["vision"][single] = np.median(table["vision"][single])
    return table


def predict(table: Table, N: int, K: Any, text: Any, images: Any) -> dict[str, Any]:
    """The figure of each part at settings, which are numbers or arrays."""
    vision, pruner = (
        by_tokens(table, part, N, K) * images_factor(table, part, N, images)
        for part in ("vision", "pruner")
    )
    pruner = pruner * text_factor(table, "pruner", N, text)
    return {"vision": vision, "pruner": pruner, "prefill": by_rows(table, text + images * K)}


def by_tokens(table: Table, part: str, N: int, K: Any) -> np.ndarray:
    """The figure of a part with one image and the shortest text, between the measured K.

    K = N prunes nothing, so it is no point of the lines.
    """
    basic = (table["images"] == 1) & (table["text"] == table["text"].min())
    x, y = table["K"][basic], table[part][basic]
    return np.where(K == N, y[x == N][0], np.interp(K, x[x < N], y[x < N]))


def images_factor(table: Table, part: str, N: int, images: Any) -> Any:
    """How many times as much a part takes with several images as with one."""
    several = table["images"] > 1
    share = (images - 1) / max(1, table["images"].max() - 1)
    return _growth(table, part, N, several, share)


def text_factor(table: Table, part: str, N: int, text: Any) -> Any:
    """How many times as much a part takes with more text than the shortest."""
    shortest, longest = table["text"].min(), table["text"].max()
    longer = (table["images"] == 1) & (table["text"] > shortest)
    share = (text - shortest) / max(1, longest - shortest)
    return _growth(table, part, N, longer, share)


def _growth(table: Table, part: str, N: int, grown: np.ndarray, share: Any) -> Any:
    """The factor at a share of the way from the basic settings to those of the mask `grown`."""
    pruned = grown & (table["K"] < N)
    basic = by_tokens(table, part, N, table["K"][pruned])
    ratios = table[part][pruned][basic != 0] / basic[basic != 0]
    return np.maximum(0, 1 + share * (np.median(ratios) - 1)) if len(ratios) else 1.0


def by_rows(table: Table, rows: Any) -> Any:
    """The figure of the prefill between the measured rows; beyond the most rows the last slope."""
    rows_S = table["text"] + table["images"] * table["K"]
    x = np.unique(rows_S)
    y = non_decreasing([np.median(table["prefill"][rows_S == n]) for n in x])
    beyond = np.maximum(0, rows - x[-1])
    return np.interp(rows, x, y) + beyond * (y[-1] - y[-2]) / (x[-1] - x[-2])


def non_decreasing(values: Sequence[float]) -> list[float]:
    """The nearest non-decreasing values by least squares (pool adjacent violators)."""
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [fmean(block) for block in blocks for _ in block]
