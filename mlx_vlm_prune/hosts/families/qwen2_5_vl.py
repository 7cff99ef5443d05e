"""Qwen2.5-VL: most layers of the tower attend within windows, and patches are ordered by them.

Shapes: S patches of all images, U = S / m^2 visual tokens, a angles.
"""

import mlx.core as mx
import numpy as np

from ..prepared_inputs import PreparedInputs
from .qwen2_vl import PackedPatches, Qwen2VLHost


class Qwen2_5VLHost(Qwen2VLHost):
    @property
    def feature_dims(self) -> int:
        dims: int = self.model.config.vision_config.out_hidden_size
        return dims

    def masked_logits(
        self, ids_1L: mx.array, x_1LD: mx.array, mask_11LL: mx.array, position_ids: mx.array | None
    ) -> mx.array:
        """From the layers: the language model leaves a mask out."""
        language = self.language
        x_1LD = language.model(
            ids_1L, inputs_embeds=x_1LD, mask=mask_11LL, position_ids=position_ids
        )
        is_tied = language.args.tie_word_embeddings
        head = language.model.embed_tokens.as_linear if is_tied else language.lm_head
        logits_1LV: mx.array = head(x_1LD)
        return logits_1LV

    def pack_patches(self, inputs: PreparedInputs) -> PackedPatches:
        packed, tower = super().pack_patches(inputs), self.tower
        order_U, ends = tower.get_window_index(inputs.extra["image_grid_thw"])
        windows = mx.array(np.unique(np.array(ends)), mx.int32)  # empty windows are listed, too

        def in_tower_order(x_Sa: mx.array) -> mx.array:
            return x_Sa.reshape(len(order_U), -1, x_Sa.shape[-1])[order_U].reshape(x_Sa.shape)

        def bounds(layer: int) -> mx.array:
            return packed.bounds(layer) if layer in tower.fullatt_block_indexes else windows

        return PackedPatches(
            in_tower_order(packed.x_SD), in_tower_order(packed.angles_Sa), bounds, np.array(order_U)
        )
