"""Qwen3.5 and its mixture of experts: Qwen3-VL's tower, and mostly recurrent layers.

Those hold a state of one size in place of rows, so they run over the rows that are left, in their
order. Positions along three axes are those of the layers that attend.
"""

from collections.abc import Sequence

from .qwen3_vl import Qwen3VLHost


class Qwen3_5Host(Qwen3VLHost):
    why_not_counted = "its recurrent layers cost the same for every row"
    language_layers_class = None
    why_no_decoder_methods = (
        "most layers of its language model hold a recurrent state, out of which no row can be taken"
        " again"
    )
    why_no_enhancer = (
        "most layers of its language model attend to no row, and mlx-vlm's batches of it leave an"
        " additive mask out"
    )

    @property
    def mask_layers(self) -> Sequence[int]:
        return (self.language.model.fa_idx,)
