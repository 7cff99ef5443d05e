"""The tower's output for the latest prompts' images.

A second question about an image needs another choice of its tokens, but not the tower again.
"""

from collections import OrderedDict
from hashlib import sha256
from typing import Any

import mlx.core as mx
import numpy as np

from ..machine.bounded_store import BoundedStore
from ..pruners import Pipeline
from .host import Host
from .prepared_inputs import PreparedInputs
from .prompt import ViewEncoder, encode_images, signal_layers
from .views import View

MAX_ENTRIES = 8  # prompts whose views are held


class TowerCache:
    """Views by the pixels that they were made from; the least recently used are dropped first."""

    def __init__(self, host: Host, pipeline: Pipeline):
        self.host, self.pipeline = host, pipeline
        self.misses = 0
        self._views: OrderedDict[bytes, list[View]] = OrderedDict()

    def __call__(self, inputs: PreparedInputs) -> list[View]:
        """The views of a prompt's images; the tower runs only if they are not held."""
        key = images_key(inputs)
        if key not in self._views:
            self.misses += 1
            self._views[key] = encode_images(self.host, inputs, self.pipeline)
        self._views.move_to_end(key)
        if len(self._views) > MAX_ENTRIES:
            self._views.popitem(last=False)
        return self._views[key]


class BoundedTowerCache:
    """Views by their pixels and by the layers of the signals, as many bytes as a store holds."""

    def __init__(self, host: Host, store: BoundedStore[list[View]]) -> None:
        self.host, self.store = host, store

    def of(self, pipeline: Pipeline) -> ViewEncoder:
        """What has the views of a prompt's images with the signals that methods need."""

        def encode(inputs: PreparedInputs) -> list[View]:
            key = (images_key(inputs), *sorted(signal_layers(self.host, pipeline).items()))
            if (views := self.store.get(key)) is None:
                views = encode_images(self.host, inputs, pipeline)
                self.store.put(key, views, sum(view.nbytes for view in views))
            return views

        return encode


def images_key(inputs: PreparedInputs) -> bytes:
    """A digest of the pixels, their shapes, and the other arguments that describe images."""
    digest = sha256()
    named = {**inputs.extra, "pixels": inputs.pixels, "images": inputs.images}
    for name in sorted(named):
        if any(part in name for part in ("image", "pixel", "patch")):
            _update(digest, name)
            _update(digest, named[name])
    return digest.digest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, mx.array):
        value = np.array(value.astype(mx.float32) if value.dtype == mx.bfloat16 else value)
    if isinstance(value, list | tuple):
        for each in value:
            _update(digest, each)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.shape}{value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    else:
        digest.update(repr(value).encode())
