"""What is asked of a model: a prompt, images, and how to answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .pruners import Pipeline, Pruner
from .pruners.contract import Policy

ImageSource = str | Path | bytes | Image.Image


@dataclass(frozen=True)
class Request:
    """The arguments of `stream_generate`, as they were given."""

    prompt: str
    images: Sequence[ImageSource]
    pruner: str | Pruner | Pipeline
    keep_ratio: float | None
    keep_tokens: int | None
    positions: Policy | None
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    template: Mapping[str, Any] | None
    prefill_step_size: int | None
    kv_bits: float | None
    resize_shape: Sequence[int] | None
    num_draft_tokens: int | None

    @property
    def is_for_mlx_vlm(self) -> bool:
        """Is there an option that only mlx-vlm's models have?"""
        return any(x is not None for x in (self.prefill_step_size, self.kv_bits, self.resize_shape))
