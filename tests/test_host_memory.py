"""Whether a model of mlx-vlm's fits into memory is said before its weights are read."""

import os
import subprocess
import sys

import mlx.core as mx
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.reading.files import open_safetensors, read_json
from mlx_vlm_prune.hosts.memory import Reading, estimate, preprocessor, weights_bytes
from mlx_vlm_prune.models import memory

from .host_folders import desk

KINDS = ["llava", "qwen2_5_vl", "smolvlm"]
CLIP = {"image_size": 336, "patch_size": 14}
INTERNVL = {"image_size": 448, "patch_size": 14}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return desk(tmp_path_factory.mktemp("hosts"), KINDS)


def weights_of(folder, dtype) -> int:
    return weights_bytes(open_safetensors(folder / "model.safetensors"), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_does_not_fit_is_refused_before_it_is_read(place, kind, monkeypatch):
    size = weights_of(place / kind, mx.float32)
    assert size == 2 * weights_of(place / kind, mx.float16)
    monkeypatch.setattr(memory, "available_bytes", lambda: size)
    load(place / kind)
    monkeypatch.setattr(memory, "available_bytes", lambda: size - 1)
    monkeypatch.setattr("mlx_vlm.utils.load", lambda *_, **__: pytest.fail("it was read"))
    sentence = r"needs 0.0 GB for its weights, and 0.0 GB are available; {}convert it in 4 bits \("
    for dtype, more in (("float32", "load it in float16 or "), ("float16", "")):
        monkeypatch.setattr(memory, "available_bytes", lambda: size // 2 - 1)
        with pytest.raises(UserError, match=sentence.format(more)):
            load(place / kind, dtype=dtype)


def test_a_picture_that_may_not_fit_beside_the_weights_is_a_warning(place, monkeypatch, caplog):
    folder = place / "llava"
    size = weights_of(folder, mx.float32)
    reading = estimate(read_json(folder / "config.json"), mx.float32)
    assert reading.visual_tokens == 16
    monkeypatch.setattr(memory, "available_bytes", lambda: size + reading.nbytes)
    load(folder, dtype="float32")
    assert not caplog.messages
    monkeypatch.setattr(memory, "available_bytes", lambda: size + reading.nbytes - 1)
    load(folder, dtype="float32")
    (line,) = caplog.messages
    assert "to read a picture of 16 visual tokens" in line and str(folder) in line
    assert "resize_shape" not in line and "load it in float16 or convert it in 4 bits" in line


@pytest.mark.parametrize(("kind", "tokens"), [("llava", 16), ("smolvlm", 20)])
def test_as_many_tokens_are_counted_as_the_largest_picture_becomes(place, kind, tokens):
    """SmolVLM cuts a.png in two times two tiles and adds the whole."""
    folder = place / kind
    config = {"scale_factor": 2} if kind == "smolvlm" else {}  # mlx-vlm's default
    config |= read_json(folder / "config.json")
    reading = estimate(config, None, preprocessor(folder))
    answer = generate(*load(folder), "w7", place / "a.png", max_tokens=1)
    assert reading.visual_tokens == answer.visual_tokens == tokens


def test_a_smaller_picture_is_advised_only_where_it_becomes_fewer_tokens(place):
    resizable = [
        estimate(read_json(place / kind / "config.json"), None).is_resizable for kind in KINDS
    ]
    assert resizable == [False, True, False]


IN_FRESH_PROCESS = """
import gc, sys
import mlx_vlm_prune, mlx.core as mx

mx.set_cache_limit(0)  # or an array may lie in a larger buffer, counted as held, that was freed
for folder in sys.argv[1:]:
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model, _ = mlx_vlm_prune.load(folder, dtype="float16")
    gc.collect()
    print(mx.get_active_memory() - before, mx.get_peak_memory() - before)
    del model
    gc.collect()
"""


def test_the_weights_that_are_counted_are_those_that_are_held(place):
    """In a fresh process; as they are read, no second copy of all is held."""
    folders = [place / kind for kind in KINDS]
    done = subprocess.run(
        [sys.executable, "-c", IN_FRESH_PROCESS, *map(str, folders)], env=os.environ,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for folder, line in zip(folders, done.stdout.splitlines(), strict=True):
        held, peak = map(int, line.split())
        counted, stored = (weights_of(folder, dtype) for dtype in (mx.float16, mx.float32))
        assert held == pytest.approx(counted, rel=0.01)  # and frequencies of rotation
        assert peak < stored + counted / 2  # MLX may read all before it casts the first


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"vision_config": {"image_size": 336, "patch_size": 14}}, 576),
        ({"vision_config": {"patch_size": 14, "spatial_merge_size": 2}}, (1024 // 14) ** 2 // 4),
        ({"vision_config": {"image_size": 364, "patch_size": 14}, "scale_factor": 2}, 169),
        ({"vision_config": {"image_size": 448, "patch_size": 14}, "downsample_ratio": 0.5}, 256),
        ({"vision_config": {"image_size": 896, "patch_size": 14}, "mm_tokens_per_image": 256}, 256),
        ({"vision_config": {"patch_size": 16}, "downsample_factor": 2}, 1024),
        ({"vision_config": {"patch_size": 16}, "vision_soft_tokens_per_image": 280}, 280),
        ({"vision_config": INTERNVL, "downsample_ratio": 0.5, "max_dynamic_patch": 12}, 13 * 256),
        ({"vision_config": CLIP, "image_grid_pinpoints": [[336, 672], [672, 672]]}, 5 * 576),
        ({"vision_config": CLIP, "image_grid_pinpoints": [7, ["x", 7], [], "a"]}, 576),
        ({"vision_config": {"image_size": "large"}, "text_config": 7}, (1024 // 14) ** 2),
        ({}, (1024 // 14) ** 2),
    ],
)
def test_a_picture_becomes_as_many_tokens_as_the_config_says(config, tokens):
    reading = estimate(config, None)
    assert isinstance(reading, Reading) and reading.visual_tokens == tokens
