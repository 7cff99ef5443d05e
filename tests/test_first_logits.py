"""Promises about a model that gives NaN: no answer, and a sentence that names the part."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from PIL import Image

from mlx_vlm_prune import Chat, batch_generate, generate, load
from mlx_vlm_prune.checkpoints.errors import UserError

from . import host_folders, tiny

QUESTION = "Is there a red star?"
PARTS = {
    "the vision tower": lambda model: model.tower,
    "the projector": lambda model: model.projector,
    "the table of word embeddings": lambda model: model.language.embed_tokens,
    "the language model": lambda model: model.language.norm,
}
HOST_PARTS = {
    "the vision tower": lambda model: model.vision_tower,
    "the projector": lambda model: model.multi_modal_projector,
    "the table of word embeddings": lambda model: model.language_model.model.embed_tokens,
    "the language model": lambda model: model.language_model.model.norm,
}


def spoil(module) -> None:
    """Makes all its weights NaN."""
    module.update(tree_map(lambda a: a * mx.nan, module.parameters()))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.checkpoint(tiny.reference(), folder)
    return folder


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("pruner", ["none", "norm", "avgpool", "fastv", "divprune+restore"])
@pytest.mark.parametrize("part", PARTS)
def test_the_part_that_gives_nan_is_named_in_every_way_in(home, part, pruner, dtype):
    model, processor = load(home / "mlx", dtype=dtype)
    spoil(PARTS[part](model))
    sentence = f"^{part} gave NaN or infinite .*; try dtype='float32'"
    options = {"pruner": pruner, "max_tokens": 2}
    options |= {} if pruner == "none" else {"keep_ratio": 0.75}
    for ask in (
        lambda: generate(model, processor, QUESTION, picture(), **options),
        lambda: batch_generate(model, processor, [QUESTION] * 2, [picture(), None], **options),
        lambda: Chat(model, processor, **options).ask(QUESTION, picture()),
    ):
        with pytest.raises(UserError, match=sentence):
            ask()


@pytest.mark.parametrize("pruner", ["none", "norm", "fastv"])
@pytest.mark.parametrize("part", HOST_PARTS)
def test_so_is_a_part_of_mlx_vlms_models(tmp_path, part, pruner):
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    model, processor = load(host_folders.checkpoint("llava", tmp_path), dtype="float32")
    spoil(HOST_PARTS[part](model))
    options = {} if pruner == "none" else {"keep_ratio": 0.75}
    with pytest.raises(UserError, match=f"^{part} gave NaN or infinite .*; try dtype='float32'"):
        generate(model, processor, "w7 w9", picture(), pruner=pruner, max_tokens=2, **options)
