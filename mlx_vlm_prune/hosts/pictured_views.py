"""How the views of a host's images lie in the pictures, for overlays and placements."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from PIL import Image

from ..generation.tiles import Layout
from ..inputs.placement import Affine, Size, compose, placement, scaling
from .prepared_inputs import ProcessorOptions
from .views import View

logger = logging.getLogger("mlx_vlm_prune")


class PicturedViews:
    """Mixin of `Host`: pictures of views, and their places in images."""

    processor: Any
    whole_view: ClassVar[int] = -1  # which of an image's tiles shows all of it

    def pictures(self, views: Sequence[View], images: Sequence[Image.Image]) -> list[Image.Image]:
        """The tower's input of each view as a picture, for the overlay of kept tokens."""
        processor = getattr(self.processor, "image_processor", None)
        mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
        pictures = []
        for view in views:
            if view.pixels_HW3 is None:
                pictures.append(images[view.image])
                continue
            pixels = np.array(view.pixels_HW3.astype(mx.float32))
            pixels = pixels * (1.0 if std is None else std) + (0.0 if mean is None else mean)
            pictures.append(Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8)))
        return pictures

    def placements(
        self, views: Sequence[View], images: Sequence[Image.Image], options: ProcessorOptions
    ) -> list[dict[str, Any]]:
        """Where what the model saw of each image lies in its file; of one in tiles, the tile that
        shows all of it. Without a map where the processor's options are none that are known."""
        places = []
        for number, image in enumerate(images):
            pairs = zip(options.resize or image.size, image.size, strict=True)
            ratio = min(most / side for most, side in pairs)
            fitted = int(image.width * ratio), int(image.height * ratio)
            tiles = [view for view in views if view.image == number]
            view, kwargs = tiles[self.whole_view], options.kwargs
            try:
                seen, to_fitted = self.to_image(view, fitted, kwargs)
                to_image = compose(to_fitted, scaling(fitted, image.size))
            except (AttributeError, LookupError, TypeError, ArithmeticError) as problem:
                # What the user gave the model's own processor is not understood here.
                logger.warning("where image %d lies in its file is not known: %r", number, problem)
                seen, to_image = self.seen_size(view), None
            places.append(placement(image, seen, to_image))
        return places

    def to_image(self, view: View, size: Size, kwargs: Mapping[str, Any]) -> tuple[Size, Affine]:
        """Width and height of a view of a whole picture, and the map from there to the picture,
        which has this size; here it is squeezed to another shape. `kwargs` are the
        processor's."""
        seen = self.seen_size(view)
        return seen, scaling(seen, size)

    def seen_size(self, view: View) -> Size:
        """Width and height of what the tower read."""
        if view.pixels_HW3 is not None:
            height, width, _ = view.pixels_HW3.shape
            return width, height
        (rows, columns), side = view.signals.grid, self.token_side
        return columns * side, rows * side

    @property
    def token_side(self) -> int:
        """Pixels along the side of a visual token, in a family whose views have no pixels."""
        raise NotImplementedError

    def drawn_views(
        self, views: Sequence[View], images: Sequence[Image.Image]
    ) -> list[tuple[Image.Image, tuple[int, int]]]:
        """The picture of each view with its (rows, columns) of visual tokens."""
        pictures = self.pictures(views, images)
        return [(each, view.signals.grid) for each, view in zip(pictures, views, strict=True)]

    def layouts(
        self, views: Sequence[View], sizes: Sequence[tuple[int, int]]
    ) -> list[Layout | None]:
        """How the views of each image lie in it, None where that is not known; `sizes` are the
        (width, height) of the images."""
        counts = Counter(view.image for view in views)
        layouts = []
        for image, size in enumerate(sizes):
            layout = self.layout(counts[image], size)
            layouts.append(layout if layout and layout.views == counts[image] else None)
        return layouts

    def layout(self, views: int, size: tuple[int, int]) -> Layout | None:
        """How so many views lie in an image of (width, height)."""
        return Layout(1, 1)
