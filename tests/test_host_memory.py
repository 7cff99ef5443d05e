"""Whether a model of mlx-vlm's fits into memory is said before its weights are read."""

import os
import subprocess
import sys

import mlx.core as mx
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.reading.files import open_safetensors, read_json
from mlx_vlm_prune.hosts.memory import Reading, estimate, weights_bytes
from mlx_vlm_prune.models import memory

from .host_folders import desk

KINDS = ["llava", "qwen2_5_vl", "smolvlm"]


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
    with pytest.raises(UserError, match=r"needs 0.0 GB for its weights, and 0.0 GB are avail"):
        load(place / kind, dtype="float32")


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


IN_FRESH_PROCESS = """
import sys
import mlx_vlm_prune, mlx.core as mx

for folder in sys.argv[1:]:
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model, _ = mlx_vlm_prune.load(folder, dtype="float16")
    print(mx.get_active_memory() - before, mx.get_peak_memory() - before)
    del model
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
        assert held == pytest.approx(counted, rel=0.05)  # and frequencies of rotation
        assert peak < stored + counted / 2  # MLX may read all before it casts the first


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"vision_config": {"image_size": 336, "patch_size": 14}}, 576),
        ({"vision_config": {"patch_size": 14, "spatial_merge_size": 2}}, (1024 // 14) ** 2 // 4),
        ({"vision_config": {"image_size": 364, "patch_size": 14}, "scale_factor": 2}, 169),
        ({"vision_config": {"image_size": 448, "patch_size": 14}, "downsample_ratio": 0.5}, 256),
        ({"vision_config": {"image_size": 896, "patch_size": 14}, "mm_tokens_per_image": 256}, 256),
        ({"vision_config": {"image_size": "large"}, "text_config": 7}, (1024 // 14) ** 2),
        ({}, (1024 // 14) ** 2),
    ],
)
def test_a_picture_becomes_as_many_tokens_as_the_config_says(config, tokens):
    reading = estimate(config, None)
    assert isinstance(reading, Reading) and reading.visual_tokens == tokens
