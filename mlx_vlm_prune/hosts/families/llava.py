"""LLaVA-1.5: CLIP (or SigLIP) at its last layer but one, two matrices, Llama.

Shapes: I pictures, N patches, K kept, D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ...checkpoints.errors import UserError
from ..layers import CountingLayers
from ..views import Inputs, View, per_picture
from .tower import TowerHost


class LlavaTowerHost(TowerHost):
    """The tower and the projector, which LLaVA-NeXT has, too."""

    @property
    def encoder_layers(self) -> Sequence[Any]:
        """Layers up to the one whose output the features are: -1 is what papers call the last
        but one of CLIP's 24."""
        layers = self.tower.encoder.layers
        return layers[: range(len(layers) + 1)[self.model.vision_feature_layer]]

    def see(self, inputs: Inputs, want: Mapping[str, int | None]) -> list[View]:
        pixels = inputs.pixels[0] if inputs.pixels.ndim == 5 else inputs.pixels  # of one's crops
        pixels_IHW3, has_cls = pixels.transpose(0, 2, 3, 1), self._has_cls
        *_, states = self.model.vision_tower(pixels_IHW3, output_hidden_states=True)
        x_IND, grid = states[self.depth][:, int(has_cls) :], self.grid_of(pixels_IHW3)
        seen = self.signals(x_IND, want, states, grid=grid, has_cls=has_cls)
        return per_picture(inputs, seen, pixels_IHW3)

    def grid_of(self, pixels_IHW3: mx.array) -> tuple[int, int]:
        """Rows and columns of patches."""
        patch = self.model.config.vision_config.patch_size
        return pixels_IHW3.shape[1] // patch, pixels_IHW3.shape[2] // patch

    @property
    def _has_cls(self) -> bool:
        """Does CLS stand before the patches? Raises UserError where those are not the tokens."""
        tower, strategy = self.model.vision_tower, self.model.vision_feature_select_strategy
        has_cls = tower.model_type == "clip_vision_model"
        if (strategy == "default") is not has_cls:
            raise UserError(
                f"this {self.kind} model's vision_feature_select_strategy is {strategy!r} over a"
                f" {tower.model_type}: its visual tokens are not the patches of a grid"
            )
        return has_cls


class LlavaHost(LlavaTowerHost):
    layers_class = CountingLayers

    def prepare(
        self, text: str, images: Sequence[Image.Image], resize: tuple[int, int] | None
    ) -> Inputs:
        """The processor's own two calls, made from here: its `__call__` hands the tokenizer's
        options to the image processor, which transformers 5.20 and later refuse
        (Blaizzy/mlx-vlm#870)."""
        if not images:
            return super().prepare(text, images, resize)
        shown, mark = [_resized(image, resize) for image in images], self.processor.image_token
        arrays = self.processor.image_processor(shown)["pixel_values"]
        pixels = mx.array(np.stack([np.asarray(each) for each in arrays]))
        rows, columns = self.grid_of(pixels.transpose(0, 2, 3, 1))
        marks = text.count(mark)
        if marks != len(images):
            raise UserError(f"the chat template gave {marks} {mark} marks for {len(images)} images")
        words = super().prepare(text.replace(mark, mark * (rows * columns)), (), None)
        return replace(words, pixels=pixels, images=len(images))


def _resized(image: Image.Image, resize: tuple[int, int] | None) -> Image.Image:
    from mlx_vlm.utils import resize_image

    return image if resize is None else resize_image(image, resize)
