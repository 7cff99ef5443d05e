"""Set up for every test: full float32, the fast BLAS, seeded numpy, an empty cache, shared data."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses the network
os.environ["MLX_ENABLE_TF32"] = "0"  # before any import of mlx, or parity is lost on CUDA

import numpy as np
import pytest
from hypothesis import settings

import mlx_vlm_prune  # noqa: F401 - its BLAS comes before any import of mlx, as for a user

settings.register_profile("untimed", deadline=None)  # no test asserts a time
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _empty_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what runs cache in a folder of this test worker, not in the user's."""
    os.environ["MLX_VLM_PRUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> None:
    """Leave what is imported out of garbage collections: mlx-vlm collects after every answer, and
    would go through all of torch and transformers each time, for a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    np.random.seed(0)


@pytest.fixture(scope="module")
def on_the_cpu_in_float64() -> Iterator[None]:
    """For files whose promises hold of float64 choices alone, whatever the machine's device."""
    from .pruner_cases import float64_choices

    with float64_choices():
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of photographs and tokenizers; tests that need it skip where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MLX_VLM_PRUNE_DATA", beside))
    if not folder.is_dir():
        pytest.skip("shared data absent")
    return folder
