"""Promises of `serve` in families whose prompts share no batch: answers are written together."""

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from mlx_vlm_prune import generate, load
from mlx_vlm_prune.evaluation.harness.options import RunOptions
from mlx_vlm_prune.hosts.families import FAMILIES

from . import host_folders, into_folders, stock_folders
from .test_harness import ask

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
ALONE = [name for name in stock_folders.FAMILIES if FAMILIES[name].why_no_batches]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    host_folders.picture(folder, "a.png", 120, 90)
    with into_folders.fastvlm_sizes():
        yield folder


@pytest.mark.parametrize("family", ALONE)
def test_answers_that_are_written_together_are_those_alone(home, family):
    """Each prompt is read alone, so they need not be equally long."""
    loaded = load(stock_folders.checkpoint(family, home), dtype="float32")
    words, image = ["w7 w9", "w3 w11 w4 w20 w8", "w5"], home / "a.png"
    for budget in ({"pruner": "divprune", "keep_ratio": 0.25}, {"pruner": "none"}):
        listed = [({"prompt": text, "images": [image], "max_tokens": 5}, ()) for text in words]
        answers = ask(loaded, RunOptions(**budget, batch_size=3), listed)
        alone = [generate(*loaded, text, image, **budget, max_tokens=5).text for text in words]
        assert [answer.text for answer in answers] == alone
