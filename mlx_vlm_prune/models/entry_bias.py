"""More attention, in the first layers, to visual rows that leave behind them.

Shapes: B prompts, I images of a group, n visual tokens of one, L rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import mlx.core as mx

from ..pruners import Pruner, Signals
from .splice import Spliced


def with_entry_bias(
    spliced: Spliced,
    pruner: Pruner | None,
    schedules: Sequence[Mapping[int, int]],
    grids: Sequence[tuple[int, int]],
) -> Spliced:
    """The rows with what a method adds to the attention that they get until its first cut."""
    if pruner is None or pruner.method.entry_bias is None:
        return spliced
    bias_BL = mx.zeros(spliced.x_BLD.shape[:2]) if spliced.bias_BL is None else spliced.bias_BL
    images = zip(spliced.prompt_of, spliced.image_columns, schedules, grids, strict=True)
    for prompt, columns, schedule, grid in images:
        left = schedule[min(schedule)] if schedule else 0
        if not 0 < left < len(columns):
            continue
        x_1nD = spliced.x_BLD[prompt : prompt + 1, columns.start : columns.stop]
        signals = Signals(x_1nD, grid, entrance_BND=x_1nD).constant
        bias_1n = pruner.call(pruner.method.entry_bias, signals, left)
        bias_BL = bias_BL.at[prompt, columns.start : columns.stop].add(bias_1n[0])
    return replace(spliced, bias_BL=bias_BL.astype(mx.float32))


def without_entry_bias(spliced: Spliced, entry: Spliced, pruner: Pruner | None) -> Spliced:
    """The rows behind the cut, where nothing else was added to attention as they entered."""
    is_over = pruner is not None and pruner.method.entry_bias is not None
    return replace(spliced, bias_BL=None) if is_over and entry.bias_BL is None else spliced
