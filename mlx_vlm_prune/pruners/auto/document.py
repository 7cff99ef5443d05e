"""Is a picture a document? By DocPrune's measure of ink, see pruners/docprune.py.

A document has a light background, and many patches without ink. Of the drawn pages nearly all are
documents so, of the drawn scenes and of photographs none (docs/log.md).

Shapes: N patches of P pixels.
"""

import mlx.core as mx
import numpy as np
from PIL import Image

from ..docprune import commonest, ink
from ..numerics import choosing

SIDE, PATCH = 448, 14  # what a picture is made to fit into, and is cut into
LEVELS_OFF = 8  # of 255, which scans and JPEG files vary by
LIGHT = 200  # of 255: paper
BLANK = 0.36  # of the patches of DocPrune's pages are background
LEAST_INK = 0.02  # of a patch that is not blank


def is_document(picture: Image.Image) -> bool:
    """Is a picture mostly blank paper?"""
    levels_NP = patches(picture)
    with choosing():
        grey_BNP = mx.array(levels_NP.astype(np.float32)[None])
        ink_N = np.array(ink(grey_BNP, level=1.0, tolerance=LEVELS_OFF).astype(mx.float32))[0]
    background_B = np.array(commonest(mx.array(levels_NP.reshape(1, -1))))
    return bool(background_B[0] >= LIGHT and (ink_N < LEAST_INK).mean() >= BLANK)


def patches(picture: Image.Image) -> np.ndarray:
    """The greys of a picture's patches, from 0 to 255, (N, P)."""
    scale = min(1.0, SIDE / max(picture.size))
    columns, rows = (max(1, int(side * scale) // PATCH) for side in picture.size)
    grey = picture.convert("L").resize((columns * PATCH, rows * PATCH))
    cut = np.asarray(grey, np.int32).reshape(rows, PATCH, columns, PATCH)
    return np.ascontiguousarray(cut.transpose(0, 2, 1, 3)).reshape(rows * columns, PATCH * PATCH)
