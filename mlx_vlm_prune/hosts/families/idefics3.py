"""Idefics3 and SmolVLM: SigLIP over tiles, of whose patches m x m make one visual token.

Shapes: T tiles, P patches, N visual tokens, K kept, D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ...generation.tiles import Layout, nearest_layout
from ..language_layers import RopeOffsetLayers
from ..prepared_inputs import PreparedInputs, ProcessorOptions
from ..views import View, assign_images, count_tiles, make_views
from .cut_tower import CutTowerHost

# In the config of a pruned folder: the token before the tile that shows a whole image.
GLOBAL_IMAGE = "global_image_token_id"


class Idefics3Host(CutTowerHost):
    why_not_learned = None
    language_layers_class = RopeOffsetLayers
    has_tiles = True

    @property
    def tower(self) -> Any:
        return self.model.vision_model

    @property
    def feature_dims(self) -> int:
        model = self.model
        dims: int = model.config.vision_config.hidden_size * model.connector.scale_factor**2
        return dims

    def masked_logits(
        self, ids_1L: mx.array, x_1LD: mx.array, mask_11LL: mx.array, position_ids: mx.array | None
    ) -> mx.array:
        logits_1LV: mx.array = self.language(ids_1L, inputs_embeds=x_1LD, mask=mask_11LL).logits
        return logits_1LV

    def encode_images(self, inputs: PreparedInputs, want: Mapping[str, int | None]) -> list[View]:
        pixels_THW3, connector, m = (
            self.tower_pixels(inputs),
            self.model.connector,
            self.token_patches,
        )
        x_TPD, _, states = self.tower(
            pixels_THW3,
            patch_attention_mask=self._patch_mask(inputs),
            output_hidden_states=True,
        )
        x_TND = connector.pixel_shuffle(x_TPD.astype(pixels_THW3.dtype), m)
        return make_views(inputs, self.signals(x_TND, want, states, m=m), pixels_THW3)

    def tower_pixels(self, inputs: PreparedInputs) -> mx.array:
        return inputs.pixels[0][_tiles(inputs)].transpose(0, 2, 3, 1)

    def _patch_mask(self, inputs: PreparedInputs) -> mx.array:
        tiles_T, mask = _tiles(inputs), inputs.extra.get("pixel_attention_mask")
        mask_THW = (
            mx.ones_like(inputs.pixels[0][tiles_T][:, 0]) if mask is None else mask[0][tiles_T]
        )
        return _patch_mask(mask_THW, self.model.config.vision_config.patch_size)

    @property
    def token_patches(self) -> int:
        m: int = self.model.connector.scale_factor
        return m

    def enter_tower(self, pixels_IHW3: mx.array, inputs: PreparedInputs) -> mx.array:
        embeddings = self.tower.embeddings
        x_IPD: mx.array = embeddings(pixels_IHW3, self._patch_mask(inputs))
        return x_IPD.astype(embeddings.patch_embedding.weight.dtype)

    def leave_tower(self, x_IKgD: mx.array) -> mx.array:
        images, K = x_IKgD.shape[:2]
        x = self.tower.post_layernorm(x_IKgD.flatten(0, 1))
        return self.model.connector.pixel_shuffle(x, self.token_patches).reshape(images, K, -1)

    def project(self, x_1KD: mx.array) -> mx.array:
        return self.model.connector.modality_projection(x_1KD)

    def join_embeddings(self, x: Sequence[mx.array], is_full: bool) -> mx.array:
        """The embeddings of all pictures in a row."""
        return mx.concatenate(list(x))

    def prepare(
        self, text: str, images: Sequence[Image.Image], options: ProcessorOptions
    ) -> PreparedInputs:
        """With the number of tiles of each image; a token marks the last, which shows all of it."""
        inputs = super().prepare(text, images, options)
        mark = getattr(self.processor, "global_image_token", "<global-img>")
        global_image = self.processor.tokenizer.convert_tokens_to_ids(mark)
        counts = count_tiles(inputs.ids, self.image_token_id(inputs), global_image)
        return replace(inputs, extra={**inputs.extra, "num_patches_list": counts})

    @property
    def word_table(self) -> Any:
        return self.language.embed_tokens

    def assign_tiles(self, inputs: PreparedInputs, views: list[View]) -> list[View]:
        """All tiles belong to one image where no token separates images."""
        global_image = getattr(self.model.config, GLOBAL_IMAGE, None)
        if global_image is None:
            return assign_images(views, [len(views)])
        counts = count_tiles(inputs.ids, self.image_token_id(inputs), global_image)
        return assign_images(views, counts)

    def layout(self, views: int, size: tuple[int, int]) -> Layout:
        return nearest_layout(views, size)

    def knows_images(self, inputs: PreparedInputs, views: Sequence[View]) -> bool:
        is_marked = hasattr(self.model.config, GLOBAL_IMAGE) or "num_patches_list" in inputs.extra
        return is_marked or len(views) <= 1


def _tiles(inputs: PreparedInputs) -> mx.array:
    """The numbers of the tiles; zeros fill up a batch."""
    is_tile = np.array((inputs.pixels[0] != 0).any(axis=(1, 2, 3)))
    return mx.array(np.flatnonzero(is_tile))


def _patch_mask(mask_THW: mx.array, size: int) -> mx.array:
    """Which patches (T, rows, columns) hold a pixel that is not padding."""
    T, rows, columns = len(mask_THW), mask_THW.shape[1] // size, mask_THW.shape[2] // size
    cut = mask_THW[:, : rows * size, : columns * size].reshape(T, rows, size, columns, size)
    return cut.any(axis=(2, 4))
