"""LLaVA-1.5: CLIP (or SigLIP) at its last layer but one, two matrices, Llama.

Shapes: I pictures, N patches, K kept, D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ...checkpoints.errors import UserError, quoted
from ...inputs.placement import Affine, Size
from ...inputs.preprocessor import Preprocessor
from ..language_layers import RopeOffsetLayers
from ..prepared_inputs import PreparedInputs, ProcessorOptions
from ..views import View, make_views
from .cut_tower import CutTowerHost

CLIP = "clip_vision_model"


class LlavaTowerHost(CutTowerHost):
    """Tower and projector of LLaVA-1.5 and LLaVA-NeXT."""

    why_no_feature_gradient = "mlx-vlm puts its visual tokens in place by a step without gradients"

    @property
    def encoder_layers(self) -> Sequence[Any]:
        """Layers up to the one that gives the features: -1 is the last but one of CLIP's 24."""
        layers = self.tower.encoder.layers
        return layers[: range(len(layers) + 1)[self.model.vision_feature_layer]]

    @property
    def layers_behind(self) -> int:
        return len(self.tower.encoder.layers) - self.depth

    def encode_images(self, inputs: PreparedInputs, want: Mapping[str, int | None]) -> list[View]:
        pixels_IHW3, with_cls = self.tower_pixels(inputs), self.tower_has_cls
        *_, states = self.model.vision_tower(pixels_IHW3, output_hidden_states=True)
        x_IND, grid = states[self.depth][:, int(with_cls) :], self.grid_of(pixels_IHW3)
        signals = self.signals(x_IND, want, states, grid=grid, has_cls=with_cls)
        return make_views(inputs, signals, pixels_IHW3)

    def tower_pixels(self, inputs: PreparedInputs) -> mx.array:
        pixels = inputs.pixels[0] if inputs.pixels.ndim == 5 else inputs.pixels  # crops
        return pixels.transpose(0, 2, 3, 1)

    @property
    def tower_has_cls(self) -> bool:
        """Raises UserError where the visual tokens are not the patches."""
        tower, strategy = self.model.vision_tower, self.model.vision_feature_select_strategy
        return has_cls(f"this {self.kind} model's", tower.model_type, strategy)

    def enter_tower(self, pixels_IHW3: mx.array, inputs: PreparedInputs) -> mx.array:
        x_ISD = super().enter_tower(pixels_IHW3, inputs)
        return self.tower.pre_layrnorm(x_ISD) if self.tower_has_cls else x_ISD

    def grid_of(self, pixels_IHW3: mx.array) -> tuple[int, int]:
        """Rows and columns of patches."""
        patch = self.model.config.vision_config.patch_size
        return pixels_IHW3.shape[1] // patch, pixels_IHW3.shape[2] // patch


def has_cls(owner: str, tower: str, strategy: str) -> bool:
    """Has the tower a CLS token before the patches? `owner` is named in the error.

    Raises UserError where the visual tokens are not the patches.
    """
    is_clip = tower == CLIP
    if (strategy == "default") is not is_clip:
        raise UserError(
            f"{owner} vision_feature_select_strategy is {quoted(strategy)} over a {tower}: its"
            " visual tokens are not the patches of a grid"
        )
    return is_clip


class LlavaHost(LlavaTowerHost):
    why_not_learned = None
    language_layers_class = RopeOffsetLayers

    @property
    def feature_dims(self) -> int:
        dims: int = self.model.config.vision_config.hidden_size
        return dims

    def prepare(
        self, text: str, images: Sequence[Image.Image], options: ProcessorOptions
    ) -> PreparedInputs:
        """Image processor and tokenizer are called from here: the processor's `__call__` gives the
        tokenizer's options to the image processor too, which transformers 5.20 and later refuse
        (Blaizzy/mlx-vlm#870)."""
        if not images:
            return super().prepare(text, images, options)
        from mlx_vlm.utils import resize_image

        mark = self.processor.image_token
        fitted = list(images)
        if size := options.resize:
            fitted = [resize_image(image, size) for image in images]
        arrays = self.processor.image_processor(fitted, **options.kwargs)["pixel_values"]
        pixels = mx.array(np.stack([np.asarray(each) for each in arrays]))
        rows, columns = self.grid_of(pixels.transpose(0, 2, 3, 1))
        marks = text.count(mark)
        if marks != len(images):
            raise UserError(f"the chat template gave {marks} {mark} marks for {len(images)} images")
        words = super().prepare(text.replace(mark, mark * (rows * columns)), (), ProcessorOptions())
        return replace(words, pixels=pixels, images=len(images))

    def to_image(self, view: View, size: Size, kwargs: Mapping[str, Any]) -> tuple[Size, Affine]:
        """Its middle is cut out, or it is made square first."""
        settings = {**vars(self.processor.image_processor), **kwargs}
        return Preprocessor(
            size=sides(settings["size"]) if settings["do_resize"] else None,
            crop=height_width(settings["crop_size"]) if settings["do_center_crop"] else None,
            pad=bool(settings.get("do_pad")),
        ).to_image(size)


def sides(size: Any) -> int | tuple[int, int]:
    """A processor's `size`: a number for the shortest side, that by its name, or height and
    width."""
    shortest: int | None = size if isinstance(size, int) else size.get("shortest_edge")
    return shortest or height_width(size)


def height_width(size: Any) -> tuple[int, int]:
    """A processor's `crop_size`: a number for both, or height and width."""
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])
