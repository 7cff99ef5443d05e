"""What sums of tokens by slot are made of: the sizes and shares of a reduction that merges.

Of a token without a slot, -1, the last slot's entry is taken, and counts 0 times.

Shapes: B images, N visual tokens, D features.
"""

import mlx.core as mx

from .numerics import fused


@fused
def mixed_sizes(size_BN: mx.array, slot_BN: mx.array) -> mx.array:
    """Sizes, 0 where a token is dropped."""
    return size_BN * (slot_BN >= 0).astype(mx.float32)


@fused
def weighing_sizes(size_BN: mx.array, share_BN: mx.array) -> mx.array:
    """Sizes, 0 where a token has no weight."""
    return mx.where(share_BN > 0, size_BN, 0)


@fused
def weighted(share_BN1: mx.array, x_BND: mx.array) -> mx.array:
    """Tokens times their shares, to add up."""
    return share_BN1 * x_BND.astype(mx.float32)


@fused
def next_slots(slot_BN: mx.array, next_BN: mx.array) -> mx.array:
    """Slots after a second reduction."""
    return mx.where(slot_BN >= 0, next_BN, -1)
