"""What the tower saw of pictures, for as long as they are talked about.

A second question about a picture needs another choice of its tokens, and not the tower again.
"""

from collections import OrderedDict
from hashlib import sha256
from typing import Any

import mlx.core as mx
import numpy as np

from ..pruners import Pipeline
from .host import Host
from .prepared_inputs import PreparedInputs
from .prompt import encode_images
from .views import View

PICTURES = 8  # prompts' pictures that are remembered


class TowerCache:
    """Views by the pixels they are of; the one longest unused is forgotten first."""

    def __init__(self, host: Host, pipeline: Pipeline):
        self.host, self.pipeline = host, pipeline
        self.misses = 0
        self._views: OrderedDict[bytes, list[View]] = OrderedDict()

    def __call__(self, inputs: PreparedInputs) -> list[View]:
        """The views of a prompt's pictures, by the tower where it has not seen these yet."""
        key = images_key(inputs)
        if key not in self._views:
            self.misses += 1
            self._views[key] = encode_images(self.host, inputs, self.pipeline)
        self._views.move_to_end(key)
        if len(self._views) > PICTURES:
            self._views.popitem(last=False)
        return self._views[key]


def images_key(inputs: PreparedInputs) -> bytes:
    """Of pixels, their shapes, and what else describes the images."""
    digest = sha256()
    named = {**inputs.extra, "pixels": inputs.pixels, "images": inputs.images}
    for name in sorted(named):
        if any(part in name for part in ("image", "pixel", "patch")):
            _add(digest, name)
            _add(digest, named[name])
    return digest.digest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, mx.array):
        value = np.array(value.astype(mx.float32) if value.dtype == mx.bfloat16 else value)
    if isinstance(value, list | tuple):
        for each in value:
            _add(digest, each)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.shape}{value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    else:
        digest.update(repr(value).encode())
