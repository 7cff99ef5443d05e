"""Tiny checkpoints that mlx-vlm loads, pruned and not, and what they answer by its own loop.

Shapes: L rows of the prompt, T tokens, V words.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_vlm_prune.hosts.compatibility import check_pipeline
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.prepared_inputs import PreparedInputs
from mlx_vlm_prune.hosts.prompt import encode_images_and_text, prune_prompt, share_budget
from mlx_vlm_prune.hosts.views import View
from mlx_vlm_prune.inputs.budget import budget
from mlx_vlm_prune.pruners import plan

from .host_models import END, IMAGE, KINDS, START, VIDEO
from .host_reference import decoded, stock

GLOBAL = 58  # Idefics3's token before the tile that shows the whole image
TILED = ("idefics3", "smolvlm")
Answer = tuple[list[int], np.ndarray]  # tokens and their log probabilities (T, V)


@contextmanager
def fastvlm_sizes() -> Iterator[None]:
    """FastViTHD's, here as there."""
    from mlx_vlm.models import fastvlm

    with pytest.MonkeyPatch.context() as sizes:
        sizes.setattr(fastvlm.VisionConfig, "layers", [1, 1, 1, 1, 2])
        sizes.setattr(fastvlm.VisionConfig, "embed_dims", [8, 16, 32, 64, 64])
        yield


def checkpoint(kind: str, home: Path) -> Path:
    """HOME/KIND: the tiny model, without a processor."""
    folder, model = home / kind, KINDS[kind].make()
    folder.mkdir()
    save(model, folder, config_of(model))
    added = {"added_tokens": [{"id": GLOBAL, "content": "<global-img>"}]}
    (folder / "tokenizer.json").write_text(json.dumps(added), encoding="utf-8")
    return folder


def save(model: Any, folder: Path, config: Mapping[str, Any]) -> None:
    weights: Any = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def config_of(model: Any) -> dict[str, Any]:
    """The model's config.json; Qwen2-VL and Qwen2.5-VL have the words' part at its root."""
    config = plain(model.config)
    if config["model_type"] in ("qwen2_vl", "qwen2_5_vl"):
        config = config.pop("text_config") | config
    return config


def plain(config: Any) -> dict[str, Any]:
    """A configuration of mlx-vlm's, as config.json has it."""
    config = {name: value for name, value in vars(config).items() if value is not None}
    return {name: plain(v) if hasattr(v, "from_dict") else v for name, v in config.items()}


def inputs_of(kind: str, model: Any, images: int) -> PreparedInputs:
    """A prompt; where tiles are told apart by a token, with that token."""
    inputs = KINDS[kind].inputs(model, images)
    return marked(inputs) if kind in TILED else inputs


def marked(inputs: PreparedInputs) -> PreparedInputs:
    """With GLOBAL before the rows of each image's last tile."""
    starts = [i for i, t in enumerate(inputs.ids) if t == IMAGE and inputs.ids[i - 1] != IMAGE]
    last = np.cumsum(inputs.extra["num_patches_list"]) - 1
    ids = list(inputs.ids)
    for at in sorted((starts[i] for i in last), reverse=True):
        ids.insert(at, GLOBAL)
    return replace(inputs, ids=ids, mask_1L=mx.ones((1, len(ids)), mx.int32))


def save_prompt(file: Path, kind: str, inputs: PreparedInputs) -> None:
    """As it is handed to mlx-vlm."""
    arrays = {"input_ids": mx.array(inputs.ids)[None], "mask": inputs.mask_1L}
    arrays |= {
        name: mx.array(value) for name, value in as_processor_gives(kind, inputs).extra.items()
    }
    mx.save_safetensors(str(file), {**arrays, "pixel_values": inputs.pixels})


def as_processor_gives(kind: str, inputs: PreparedInputs) -> PreparedInputs:
    """As the family's processor hands it to mlx-vlm: it does not say how tiles belong together."""
    return replace(inputs, extra={}) if kind in TILED else inputs


def video() -> PreparedInputs:
    """A prompt of Qwen's about a film of two times two frames, 4 x 6 patches each."""
    patches = np.random.default_rng(5).normal(size=(2 * 24, 3 * 2 * 14 * 14)).astype(np.float32)
    ids = [3, 9, 4, START, *[VIDEO] * 12, END, 5, 8, 2, 30]
    film = {"pixel_values_videos": mx.array(patches), "video_grid_thw": mx.array([[2, 4, 6]])}
    return PreparedInputs(ids, mx.ones((1, len(ids)), mx.int32), extra=film)


def answer(kind: str, model: Any, inputs: PreparedInputs, **options: Any) -> Answer:
    """Of a folder's model, by mlx-vlm's loop."""
    return stock(model, as_processor_gives(kind, inputs), **options)


def ours(
    model: Any, inputs: PreparedInputs, spec: str, ratio: float | None, tokens: int | None
) -> Answer:
    """Of the model that is not pruned, which our own path gives a short prompt."""
    pipeline = plan(spec)
    host = host_of(model)
    policy = check_pipeline(host, pipeline, None)

    def budgets(views: Sequence[View]) -> list[int]:
        parts: list[int] = []
        for image in range(1 + max(view.image for view in views)):
            sizes = [view.N for view in views if view.image == image]
            parts += share_budget(budget(sum(sizes), ratio, tokens, pipeline), sizes)
        return parts

    views = encode_images_and_text(host, inputs, pipeline, budgets)
    short = prune_prompt(host, inputs, views, pipeline, budgets(views), policy)
    return decoded(model, short.arguments)


def assert_same(answered: Answer, expected: Answer) -> None:
    assert answered[0] == expected[0]
    np.testing.assert_allclose(answered[1], expected[1], rtol=0, atol=1e-4)


def max_images(kind: str) -> int:
    """Images in the longest prompt."""
    return len(KINDS[kind].tiles)
