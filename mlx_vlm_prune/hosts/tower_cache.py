"""The tower's output for earlier prompts' images.

A second question about an image needs another choice of its tokens, but not the tower again.
"""

from functools import partial
from hashlib import sha256
from typing import Any

import mlx.core as mx
import numpy as np

from ..machine.bounded_store import BoundedStore
from ..pruners import Pipeline, Stage
from .host import Host
from .prepared_inputs import PreparedInputs
from .prompt import ImageBudget, ViewEncoder, encode_images, signal_layers
from .views import View

MAX_PROMPTS = 8  # whose views are held, without another store


class TowerCache:
    """Views by the pixels that they were made from, by the layers of their signals, and by what
    left inside the tower, as many as a store holds; `misses` counts the runs of the tower."""

    def __init__(self, host: Host, store: BoundedStore[list[View]] | None = None) -> None:
        self.host, self.misses = host, 0
        self.store = BoundedStore[list[View]](most_values=MAX_PROMPTS) if store is None else store

    def of(self, pipeline: Pipeline, budget: ImageBudget) -> ViewEncoder:
        """What has the views of a prompt's images with the signals that methods need."""
        return partial(self._views, pipeline, budget)

    def _views(self, pipeline: Pipeline, budget: ImageBudget, inputs: PreparedInputs) -> list[View]:
        if not self.store.most_bytes:  # then no key is made of all pixels
            self.misses += 1
            return encode_images(self.host, inputs, pipeline, budget.by_view(pipeline))
        wanted = signal_layers(self.host, pipeline)
        inside = (pipeline.spec, budget) if pipeline.at(Stage.ENCODER) else None
        key = (images_key(inputs), *sorted(wanted.items(), key=repr), inside)
        if (views := self.store.get(key)) is None:
            self.misses += 1
            views = encode_images(self.host, inputs, pipeline, budget.by_view(pipeline))
            try:
                mx.async_eval([view.arrays for view in views])  # not what they are computed from
            except ValueError:  # inside a transformation of MLX, which traces and holds nothing
                return views
            self.store.put(key, views, sum(view.nbytes for view in views))
        return views


def images_key(inputs: PreparedInputs) -> bytes:
    """A digest of the pixels, their shapes, and the other arguments that describe images."""
    digest = sha256()
    named = {**inputs.extra, "pixels": inputs.pixels, "images": inputs.images}
    for name in sorted(named):
        if any(part in name for part in ("image", "video", "pixel", "patch", "spatial")):
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
