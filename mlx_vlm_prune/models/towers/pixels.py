"""What a tower reads of a picture, patch by patch: pixels and greys.

Shapes: B images, N patches.
"""

import mlx.core as mx

GREY = (0.299, 0.587, 0.114)  # of red, green and blue, as in ITU-R BT.601


def patch_greys(pixels_BHW3: mx.array, size: int) -> mx.array:
    """Each patch's own pixels as greys, (B, N, size * size)."""
    return patch_pixels(greys(pixels_BHW3)[..., None], size)


def greys(pixels_3: mx.array) -> mx.array:
    """Pixels (…, 3) as greys (…)."""
    return (pixels_3.astype(mx.float32) * mx.array(GREY)).sum(axis=-1)


def patch_pixels(pixels_BHW3: mx.array, size: int) -> mx.array:
    """Each patch's own pixels, (B, N, size * size * 3); of greys a third of those."""
    B, H, W, C = pixels_BHW3.shape
    rows, columns = H // size, W // size  # pixels beyond the last whole patch are read by none
    cells = pixels_BHW3[:, : rows * size, : columns * size].reshape(B, rows, size, columns, size, C)
    return cells.swapaxes(2, 3).reshape(B, rows * columns, -1)
