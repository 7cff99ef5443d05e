"""A note where the built-in model, which knows drawn scenes only, gets a photograph."""

import logging
from collections.abc import Sequence
from typing import Any

from ..inputs.image import MAX_PIXELS, open_image
from ..scenes import SIZE

logger = logging.getLogger("mlx_vlm_prune")
SCENES_ONLY = (
    "the built-in model knows its own drawn scenes only, not photographs; for those convert"
    " a trained checkpoint (mlx-vlm-prune convert to-mlx --help) and give it as --model"
)


def warn_of_photographs(
    processor: Any, images: Sequence[Any], max_pixels: int = MAX_PIXELS
) -> None:
    """A note where the built-in model gets something else than its drawn scenes.

    Raises UserError for a broken file.
    """
    if getattr(processor, "is_scenes", False) and any(
        open_image(image, max_pixels).size != (SIZE, SIZE) for image in images
    ):
        logger.warning(SCENES_ONLY)
