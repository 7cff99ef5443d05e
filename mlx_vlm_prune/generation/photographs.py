"""A note where a model of drawn scenes, such as the built-in one, gets a photograph."""

import logging
from collections.abc import Sequence
from typing import Any

from ..inputs.image import MAX_PIXELS, open_image

logger = logging.getLogger("mlx_vlm_prune")
SCENES_ONLY = (
    "this model knows its own drawn scenes only, not photographs; for those convert"
    " a trained checkpoint (mlx-vlm-prune convert to-mlx --help) and give it as --model"
)


def warn_of_photographs(
    processor: Any, images: Sequence[Any], max_pixels: int = MAX_PIXELS
) -> None:
    """A note where such a model gets something else than its drawn scenes.

    Raises UserError for a broken file.
    """
    if getattr(processor, "is_scenes", False) and any(
        open_image(image, max_pixels).size != processor.image.crop for image in images
    ):
        logger.warning(SCENES_ONLY)
