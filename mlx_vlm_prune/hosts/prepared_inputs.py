"""What a model's own processor makes of a prompt and its images.

Shapes: L rows of the prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class PreparedInputs:
    """One prompt: ids and pixels."""

    ids: list[int]  # placeholders included
    mask_1L: mx.array
    pixels: Any = None  # laid out as the family's tower reads them; None without images
    images: int = 0  # how many
    extra: Mapping[str, Any] = field(default_factory=dict)  # such as image_grid_thw

    @property
    def is_clip(self) -> bool:
        """Are the pixels those of a clip?"""
        return self.extra.get("video_grid_thw") is not None

    @property
    def grids_I3(self) -> Any:
        """Frames (of a clip in groups, of a picture one), rows and columns of patches."""
        return self.extra["video_grid_thw" if self.is_clip else "image_grid_thw"]


@dataclass(frozen=True)
class ProcessorOptions:
    """Width and height that pictures are to fit in, and what the model's own processor is given."""

    resize: tuple[int, int] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
