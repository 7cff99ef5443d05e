"""Where the views' visual tokens stand in the whole prompt, as the language model rotates them.

Shapes: N visual tokens of a view, L rows of the prompt, A position axes.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from .host import Host
from .prepared_inputs import PreparedInputs
from .prompt_arguments import mrope_index, row_numbers, rows_of_views
from .views import View


def add_rotation(host: Host, inputs: PreparedInputs, views: Sequence[View]) -> list[View]:
    """The views with the means of the cosines and sines by which the language model's first layer
    rotates their tokens, if all stay. A family whose layers are driven from here has a placeholder
    for each token. Raises UserError where placeholders and visual tokens differ."""
    layers = host.language_layers
    assert layers is not None and host.placeholder_unit == "token", "`check_pipeline` comes first"
    positions_1LA, rotated = prompt_positions(host, inputs), []
    by_view = rows_of_views(host, inputs, views) if views else []
    for view, rows in zip(views, by_view, strict=True):
        rows_N = row_numbers(rows)
        if view.kept is not None and view.kept.index_BK is not None:
            rows_N = rows_N[view.kept.index_BK[0]]
        cosine_1N, sine_1N = layers.mean_rotation(0, positions_1LA[:, rows_N])
        signals = view.signals.replace(rotary_cosine_BN=cosine_1N, rotary_sine_BN=sine_1N)
        rotated.append(replace(view, signals=signals))
    return rotated


def prompt_positions(host: Host, inputs: PreparedInputs) -> mx.array:
    """The positions of the whole prompt's rows, (1, L), or (1, L, 3) of a model with M-RoPE."""
    if not host.has_mrope:
        return mx.arange(len(inputs.ids))[None]
    positions_31L, _ = mrope_index(host, inputs)
    return positions_31L.transpose(1, 2, 0)
