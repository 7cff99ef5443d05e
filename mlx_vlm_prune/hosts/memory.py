"""What the tower saw of pictures, for as long as they are talked about.

A second question about a picture needs another choice of its tokens, and not the tower again.
"""

from collections import OrderedDict
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import mlx.core as mx
import numpy as np

from .views import Inputs, View

PICTURES = 8  # prompts' pictures that are remembered


class Memory:
    """Views by the pixels they are of; the one longest unused is forgotten first."""

    def __init__(self, room: int = PICTURES):
        self.room = room
        self._held: OrderedDict[bytes, list[View]] = OrderedDict()

    def recall(self, key: bytes) -> list[View] | None:
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def keep(self, key: bytes, views: list[View]) -> None:
        self._held[key] = views
        while len(self._held) > self.room:
            self._held.popitem(last=False)


def key_of(inputs: Inputs) -> bytes:
    """Of pixels, their shapes, and what else is told of the images."""
    digest = sha256()
    told: Mapping[str, Any] = {**inputs.extra, "pixels": inputs.pixels, "images": inputs.images}
    for name in sorted(told):
        if name in ("pixels", "images") or "image" in name or "pixel" in name or "patch" in name:
            _add(digest, name)
            _add(digest, told[name])
    return digest.digest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, list | tuple):
        for each in value:
            _add(digest, each)
    elif isinstance(value, mx.array):
        value = value.astype(mx.float32) if value.dtype == mx.bfloat16 else value
        _add(digest, np.array(value))
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.shape}{value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    else:
        digest.update(repr(value).encode())
