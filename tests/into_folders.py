"""Tiny checkpoints that mlx-vlm loads, and a run of them in a process that has no package of ours.

Shapes: L rows of the prompt, T tokens, V words.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_vlm_prune.hosts.views import Inputs

from .host_models import IMAGE, KINDS

GLOBAL = 58  # Idefics3's token before the tile that shows the whole image
TILED = ("idefics3", "smolvlm")
ROOT = Path(__file__).resolve().parents[1]
# What a folder answers, by mlx-vlm alone. FastViTHD's sizes are no settings of its configuration.
RUN = """
import json, sys
home, jobs, ours = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
if ours:
    sys.path.insert(0, ours)
else:
    sys.modules["mlx_vlm_prune"] = sys.modules["convert"] = None
from pathlib import Path
import mlx.core as mx, numpy as np
import mlx_vlm.models.fastvlm as fastvlm
from mlx_vlm.generate.ar import generate_step
from mlx_vlm.utils import load_model
fastvlm.VisionConfig.layers = [1, 1, 1, 1, 2]
fastvlm.VisionConfig.embed_dims = [8, 16, 32, 64, 64]
for name, folder, prompt, step in jobs:
    told = dict(mx.load(f"{home}/{prompt}.safetensors"))
    tiles = told.pop("num_patches_list", None)
    if tiles is not None:
        told["num_patches_list"] = tiles.tolist()
    try:
        model = load_model(Path(home) / folder)
    except Exception as problem:
        raise SystemExit(f"{folder}: {problem!r}")
    ids, pixels, mask = (told.pop(x, None) for x in ("input_ids", "pixel_values", "mask"))
    options = dict(max_tokens=5, temperature=0, prefill_step_size=step)
    steps = list(generate_step(ids, model, pixels, mask, **options, **told))
    tokens, odds = [int(t) for t, _ in steps], np.stack([np.array(o) for _, o in steps])
    np.savez(f"{home}/{name}.npz", tokens=tokens, odds=odds)
"""


@contextmanager
def fastvlm_sizes() -> Iterator[None]:
    """FastViTHD's, here as there."""
    from mlx_vlm.models import fastvlm

    with pytest.MonkeyPatch.context() as sizes:
        sizes.setattr(fastvlm.VisionConfig, "layers", [1, 1, 1, 1, 2])
        sizes.setattr(fastvlm.VisionConfig, "embed_dims", [8, 16, 32, 64, 64])
        yield


@dataclass(frozen=True)
class Job:
    """A folder and a prompt in `home`, by name."""

    name: str
    folder: str
    prompt: str
    step: int | None = 2048


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
    told = plain(model.config)
    if told["model_type"] in ("qwen2_vl", "qwen2_5_vl"):
        told = told.pop("text_config") | told
    return told


def plain(config: Any) -> dict[str, Any]:
    """A configuration of mlx-vlm's, as config.json has it."""
    told = {name: value for name, value in vars(config).items() if value is not None}
    return {name: plain(v) if hasattr(v, "from_dict") else v for name, v in told.items()}


def inputs_of(kind: str, model: Any, images: int) -> Inputs:
    """A prompt; where tiles are told apart by a token, with that token."""
    inputs = KINDS[kind].inputs(model, images)
    return marked(inputs) if kind in TILED else inputs


def marked(inputs: Inputs) -> Inputs:
    """With GLOBAL before the rows of each image's last tile."""
    starts = [i for i, t in enumerate(inputs.ids) if t == IMAGE and inputs.ids[i - 1] != IMAGE]
    last = np.cumsum(inputs.extra["num_patches_list"]) - 1
    ids = list(inputs.ids)
    for at in sorted((starts[i] for i in last), reverse=True):
        ids.insert(at, GLOBAL)
    return replace(inputs, ids=ids, mask_1L=mx.ones((1, len(ids)), mx.int32))


def save_prompt(file: Path, kind: str, inputs: Inputs) -> None:
    """As the family's processor hands it to mlx-vlm."""
    told = {"input_ids": mx.array(inputs.ids)[None], "mask": inputs.mask_1L}
    if inputs.pixels is not None:
        told["pixel_values"] = inputs.pixels
        extra = {} if kind in TILED else inputs.extra
        told |= {name: mx.array(value) for name, value in extra.items()}
    mx.save_safetensors(str(file), told)


def run(home: Path, jobs: list[Job], with_us: bool = False) -> subprocess.CompletedProcess[str]:
    """Answer all jobs in one process of mlx-vlm's; HOME/NAME.npz holds tokens and odds (T, V)."""
    told = json.dumps([[job.name, job.folder, job.prompt, job.step] for job in jobs])
    command = [sys.executable, "-c", RUN, str(home), told, str(ROOT) if with_us else ""]
    return subprocess.run(command, cwd=home, capture_output=True, text=True)


def answer(home: Path, name: str) -> tuple[list[int], np.ndarray]:
    with np.load(home / f"{name}.npz") as held:
        return held["tokens"].tolist(), held["odds"]
