"""A note where a model of drawn scenes, such as the built-in one, gets a photograph."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

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
    if has_photograph(processor, (open_image(image, max_pixels) for image in images)):
        logger.warning(SCENES_ONLY)


def has_photograph(processor: Any, pictures: Iterable[Image.Image]) -> bool:
    """Does a model of drawn scenes get something else: no square as large as those?"""
    is_scenes = getattr(processor, "is_scenes", False)
    return is_scenes and any(picture.size != processor.image.crop for picture in pictures)
