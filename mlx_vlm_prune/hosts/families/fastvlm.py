"""FastVLM: FastViTHD, whose last stage attends; no CLS, and one placeholder for the image.

Shapes: I pictures, N = H * W cells of the last stage, K kept, D features, C channels, h heads,
d head size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from ...checkpoints.errors import UserError
from ...pruners.contract import Signals
from ...towers.between import Between
from ..host import Host
from ..views import Inputs, View


class FastVLMHost(Host):
    placeholders = "image"

    @property
    def depth(self) -> int:
        """Blocks of the last stage, all of which are run; 0 where they do not attend."""
        stage = self.model.vision_tower.vision_model.network[-1]
        return len(stage) if hasattr(stage[0].token_mixer, "qkv") else 0

    def see(self, inputs: Inputs, want: Mapping[str, int | None]) -> list[View]:
        if inputs.images > 1:
            raise UserError(
                "a fastvlm model reads one image here: mlx-vlm puts the words between several"
                " images in the wrong places"
            )
        assert inputs.pixels is not None
        tower = self.model.vision_tower.vision_model
        dtype = tower.patch_embed.blocks[0].reparam_conv.weight.dtype
        pixels_IHW3 = inputs.pixels.astype(dtype).transpose(0, 2, 3, 1)
        x_IHWC = tower.patch_embed(pixels_IHW3)
        for part in tower.network[:-1]:
            x_IHWC = part(x_IHWC)
        images, (H, W) = len(x_IHWC), x_IHWC.shape[1:3]
        bare = Signals(mx.zeros((images, H * W, 1)), (H, W))
        run = Between(bare, want, self.depth, (), has_cls=False)
        for i, block in enumerate(tower.network[-1]):
            if i in run.want.values():
                run.read(i, *_queries_and_keys(block, x_IHWC))
            x_IHWC = block(x_IHWC)
        seen = run.end(tower.conv_exp(x_IHWC).reshape(images, H * W, -1)).signals
        return [View(i, seen.of(i), pixels) for i, pixels in enumerate(pixels_IHW3)]

    def project(self, x_1KD: mx.array) -> mx.array:
        return self.model.mm_projector(x_1KD)

    def hand_over(
        self, x: Sequence[mx.array], deep: Sequence[Sequence[mx.array]], is_full: bool
    ) -> dict[str, Any]:
        """A picture's embeddings (K, D) each, put in place of its one placeholder."""
        return {"cached_image_features": list(x)}


def _queries_and_keys(block: Any, x_IHWC: mx.array) -> tuple[mx.array, mx.array]:
    """(I, h, N, d) each."""
    mixer = block.token_mixer
    qkv = mixer.qkv(block.norm(x_IHWC).flatten(1, 2))
    q, k, _ = qkv.reshape(*qkv.shape[:2], 3, mixer.num_heads, mixer.head_dim).transpose(
        2, 0, 3, 1, 4
    )
    return q, k
