"""LLaVA-1.5: CLIP (or SigLIP) at its last layer but one, two matrices, Llama.

Shapes: I pictures, N patches, K kept, D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
from PIL import Image

from ...checkpoints.errors import UserError
from ...pruners.contract import Signals
from ..host import Host
from ..layers import CountingLayers
from ..views import Inputs, View, per_picture
from .common import signals


class LlavaTowerHost(Host):
    """The tower and the projector, which LLaVA-NeXT has, too."""

    @property
    def depth(self) -> int:
        """Layers up to the one whose output the features are: -1 is what papers call the last
        but one of CLIP's 24."""
        layers = self.model.vision_tower.vision_model.encoder.layers
        return range(len(layers) + 1)[self.model.vision_feature_layer]

    def encode(
        self, pixels_I3HW: mx.array, want: Mapping[str, int | None]
    ) -> tuple[Signals, mx.array]:
        """Signals, and the pixels (I, H, W, 3) as the tower read them."""
        pixels_IHW3 = pixels_I3HW.transpose(0, 2, 3, 1)
        *_, states = self.model.vision_tower(pixels_IHW3, output_hidden_states=True)
        n, first = self.depth, self._first
        layers = self.model.vision_tower.vision_model.encoder.layers[:n]
        grid = self.grid_of(pixels_IHW3)
        seen = signals(states[n][:, first:], grid, want, layers, states, bool(first))
        return seen, pixels_IHW3

    def grid_of(self, pixels_IHW3: mx.array) -> tuple[int, int]:
        """Rows and columns of patches."""
        patch = self.model.config.vision_config.patch_size
        return pixels_IHW3.shape[1] // patch, pixels_IHW3.shape[2] // patch

    @property
    def _first(self) -> int:
        """Where the patches begin: after CLS, if there is one."""
        tower, strategy = self.model.vision_tower, self.model.vision_feature_select_strategy
        has_cls = tower.model_type == "clip_vision_model"
        if (strategy == "default") is not has_cls:
            raise UserError(
                f"this {self.kind} model's vision_feature_select_strategy is {strategy!r} over a"
                f" {tower.model_type}: its visual tokens are not the patches of a grid"
            )
        return int(has_cls)

    def project(self, x_1KD: mx.array) -> mx.array:
        return self.model.multi_modal_projector(x_1KD)


class LlavaHost(LlavaTowerHost):
    layers_class = CountingLayers

    def see(self, inputs: Inputs, want: Mapping[str, int | None]) -> list[View]:
        assert inputs.pixels is not None
        return per_picture(inputs, *self.encode(inputs.pixels, want))

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
